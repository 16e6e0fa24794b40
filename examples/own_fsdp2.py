"""One's own FSDP2: `fully_shard` on the blocks and the model, one's own mesh; `own_loop.py`'s model and text.

torchrun --nproc-per-node 2 examples/own_fsdp2.py [--seed 0] [--short]
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parent))
from beside import compare_with_one_process
from own_loop import CONFIG, Model, batch, loss_of, text

from loqt_scale import attach, convert_to_loqt, muon
from loqt_scale.strategies import packed_bytes_may_be_sharded


def train(steps: int, seed: int = 0) -> list[float]:
    """Losses, means over ranks. Every rank."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device_type, (world_size,), mesh_dim_names=("dp",))
    torch.manual_seed(seed)
    model = Model()
    before = model.state_dict()  # on every rank, in host memory: for the first merge
    convert_to_loqt(model, CONFIG)
    model.to(device_type)
    with packed_bytes_may_be_sharded():  # torch 2.13 needs it no more
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = muon(model, lr=1e-2)
    merges = attach(model, optimizer, CONFIG, initial_weights=before)
    if rank == 0:
        print(f"found: {merges.description}")
    (data, _), generator, losses = text(), torch.Generator().manual_seed(seed), []
    for step in range(steps):
        merges.prepare(backward_passes=1)
        loss = loss_of(model, batch(data, generator)[rank::world_size].to(device_type))
        loss.backward()
        optimizer.step()
        report = merges.finish()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / world_size)
        if rank == 0 and (report is not None or step % 50 == 0):
            print(f"step {step}: loss {losses[-1]:.3f}{', merged' if report is not None else ''}", flush=True)
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = train(4 if args.short else 200, args.seed)
    if os.environ["RANK"] == "0":
        compare_with_one_process(found, args.seed)
