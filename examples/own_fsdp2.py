"""One's own FSDP2: `fully_shard` on the blocks and the model, one's own mesh; `own_loop.py`'s model and text.

torchrun --nproc-per-node 2 examples/own_fsdp2.py [--short]
"""

import os
import sys
from copy import deepcopy
from pathlib import Path
from statistics import mean

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parent))
from beside import RATES, beside_one_process
from compare import Result, compare, means, measured
from own_loop import CONFIG, Model, batch, loss_of, text

from loqt_scale import attach, convert_to_loqt, muon
from loqt_scale.strategies import packed_bytes_may_be_sharded, place

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def train(method: str, seed: int, rate: float, short: bool) -> Result:
    """Every rank."""
    rank, world_size, low_rank = dist.get_rank(), dist.get_world_size(), method.startswith("loqt")
    mesh = init_device_mesh(DEVICE, (world_size,), mesh_dim_names=("dp",))
    torch.manual_seed(seed)
    model = Model()
    before = model.state_dict()  # on every rank, in host memory: for the first merge
    matrices = convert_to_loqt(model if low_rank else deepcopy(model), CONFIG)  # their names
    model.to(DEVICE)
    with packed_bytes_may_be_sharded():  # torch 2.13 needs it no more
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = muon(model, lr=rate, dense_layers=[] if low_rank else matrices)
    if low_rank:
        merges = attach(model, optimizer, CONFIG, initial_weights=before, seed=seed)
    else:
        place(model, optimizer)  # tells Muon how the model is spread, as `attach` does
    (training, held_out), generator, losses = text(), torch.Generator().manual_seed(seed), []
    for _ in range(4 if short else 400):
        if low_rank:
            merges.prepare(backward_passes=1)
        loss = loss_of(model, batch(training, generator)[rank::world_size].to(DEVICE))
        loss.backward()
        optimizer.step()
        if low_rank:
            merges.finish()
        optimizer.zero_grad()
        losses.append(over_ranks(loss))
    with torch.no_grad():
        fixed = torch.Generator().manual_seed(0)
        pieces = [batch(held_out, fixed)[rank::world_size].to(DEVICE) for _ in range(10)]
        score = mean(over_ranks(loss_of(model, piece)) for piece in pieces)
    model.reshard()  # which a forward pass without a backward pass leaves whole
    return measured(score, means(losses), model, optimizer)


def over_ranks(loss: torch.Tensor) -> float:
    """Their mean."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


if __name__ == "__main__":
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    is_first = dist.get_rank() == 0
    found = compare(train, name="own_fsdp2", score="held-out loss, nats a byte", curve="training loss", rates=RATES)
    dist.destroy_process_group()
    if is_first:
        beside_one_process(found)
