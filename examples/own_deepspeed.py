"""One's own DeepSpeed engine, ZeRO stage 1, 2 or 3; `own_loop.py`'s model and text.

torchrun --nproc-per-node 2 examples/own_deepspeed.py [--stage 2] [--seed 0] [--short]
"""

import argparse
import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from beside import compare_with_one_process
from own_loop import CONFIG, SEQUENCES, Model, batch, loss_of, text

from loqt_scale import attach, convert_to_loqt, muon


def train(stage: int, steps: int, seed: int = 0) -> list[float]:
    """Losses, means over ranks. Every rank."""
    settings = {
        "train_micro_batch_size_per_gpu": SEQUENCES // int(os.environ["WORLD_SIZE"]),
        "zero_allow_untested_optimizer": True,  # Muon
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # else DeepSpeed clips to 1.0, which a loop in plain PyTorch does not
    }
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # on a CPU gloo serves, without a compiler
    deepspeed.init_distributed()
    torch.manual_seed(seed)
    model = Model()
    before = model.state_dict()
    convert_to_loqt(model, CONFIG)
    optimizer = muon(model, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    merges = attach(engine, optimizer, CONFIG, initial_weights=before)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        print(f"found: {merges.description}")
    (data, _), generator, losses = text(), torch.Generator().manual_seed(seed), []
    for step in range(steps):
        merges.prepare(backward_passes=1)
        loss = loss_of(engine, batch(data, generator)[rank::world_size].to(engine.device))
        engine.backward(loss)
        engine.step()
        report = merges.finish()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / world_size)
        if rank == 0 and (report is not None or step % 50 == 0):
            print(f"step {step}: loss {losses[-1]:.3f}{', merged' if report is not None else ''}", flush=True)
    engine.destroy()
    deepspeed.comm.destroy_process_group()
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=2)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args, _ = parser.parse_known_args()
    found = train(args.stage, 4 if args.short else 200, args.seed)
    if os.environ["RANK"] == "0":
        compare_with_one_process(found, args.seed)
