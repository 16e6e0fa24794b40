"""One's own DeepSpeed engine, ZeRO stage 1, 2 or 3; `own_loop.py`'s model and text.

torchrun --nproc-per-node 2 examples/own_deepspeed.py [--stage 2] [--short]
"""

import argparse
import os
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import mean

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from beside import RATES, beside_one_process
from compare import Result, compare, means, measured
from own_loop import CONFIG, SEQUENCES, Model, batch, loss_of, text

from loqt_scale import attach, convert_to_loqt, muon
from loqt_scale.strategies import place


def settings(stage: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": SEQUENCES // dist.get_world_size(),
        "zero_allow_untested_optimizer": True,  # Muon
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},  # else small ones stay whole
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # else DeepSpeed clips to 1.0, which a loop in plain PyTorch does not
    }


def train(stage: int, method: str, seed: int, rate: float, short: bool) -> Result:
    """Every rank."""
    rank, world_size, low_rank = dist.get_rank(), dist.get_world_size(), method.startswith("loqt")
    torch.manual_seed(seed)
    model = Model()
    before = model.state_dict()
    matrices = convert_to_loqt(model if low_rank else deepcopy(model), CONFIG)  # their names
    optimizer = muon(model, lr=rate, dense_layers=[] if low_rank else matrices)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(stage))
    if low_rank:
        merges = attach(engine, optimizer, CONFIG, initial_weights=before, seed=seed)
    else:
        place(engine, optimizer)  # tells Muon what of which matrix a rank holds, as `attach` does
    (training, held_out), generator, losses = text(), torch.Generator().manual_seed(seed), []
    for _ in range(4 if short else 400):
        if low_rank:
            merges.prepare(backward_passes=1)
        loss = loss_of(engine, batch(training, generator)[rank::world_size].to(engine.device))
        engine.backward(loss)
        engine.step()
        if low_rank:
            merges.finish()
        losses.append(over_ranks(loss))
    with torch.no_grad():
        fixed = torch.Generator().manual_seed(0)
        pieces = [batch(held_out, fixed)[rank::world_size].to(engine.device) for _ in range(10)]
        score = mean(over_ranks(loss_of(engine, piece)) for piece in pieces)
    zero = engine.optimizer
    copies = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    result = measured(score, means(losses), model, optimizer, copies=copies)
    engine.destroy()
    return result


def over_ranks(loss: torch.Tensor) -> float:
    """Their mean."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=2)
    stage = parser.parse_known_args()[0].stage
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # on a CPU gloo serves, without a compiler
    deepspeed.init_distributed()
    is_first, name = dist.get_rank() == 0, f"own_deepspeed-{stage}"
    words = {"score": "held-out loss, nats a byte", "curve": "training loss"}
    found = compare(partial(train, stage), name=name, rates=RATES, **words)
    deepspeed.comm.destroy_process_group()
    if is_first:
        beside_one_process(found)
