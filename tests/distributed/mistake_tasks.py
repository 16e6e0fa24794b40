"""What loops on several ranks do that would hang, drift apart or mix sketches in silence."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from loqt_scale import attach, save_merged
from loqt_scale.errors import UserError
from tests.distributed.adopted_tasks import STEPS, batch, converted, fully_shard, loss_of, trained


def told(call: Any) -> str:
    """What a call is refused with."""
    try:
        call()
    except UserError as error:
        return str(error)
    return ""


def mistakes(folder: str) -> dict[str, Any]:
    """What each is told, and what works. Every rank, of two."""
    found: dict[str, Any] = {"attached before the ranks met": _late()}
    rank = dist.get_rank()
    model, before, settings = converted("none")
    replicated = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(trained(model))

    def attached(**changes: Any) -> Any:
        return attach(replicated, optimizer, settings, initial_weights=before, **changes)

    found["seed"] = told(lambda: attached(seed=rank))
    found["length"] = told(lambda: attached(total_steps=8 + rank))
    merges = attached()
    with replicated.join():
        found["join"] = told(merges.prepare)
    state = {**merges.state_dict(), "position": 3}
    merges = attached()
    if rank == 0:
        merges.load_state_dict(state)
    found["state on one rank"] = told(merges.prepare)
    if rank == 0:
        save_merged(replicated, Path(folder) / "merged")  # the others need not
    dist.barrier()
    found["saved"] = (Path(folder) / "merged" / "model.safetensors").exists()
    return found


def mesh_of_one() -> list[str]:
    """What a rank is warned of that shards its model over itself alone. Every rank, of two."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))["data"]
    model, before, settings = converted("none")
    fully_shard(model, mesh=mesh)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach(model, torch.optim.AdamW(trained(model)), settings, initial_weights=before)
    return [str(each.message) for each in caught if "LoQT" in str(each.message)]


def _late() -> str:
    """As under torch.multiprocessing.spawn, where nothing tells of other ranks before they meet."""
    model, _, settings = converted("none")
    with patch.dict(os.environ):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)
        merges = attach(model, torch.optim.AdamW(trained(model)), settings)
    dist.init_process_group("gloo")
    return told(merges.prepare)


def evaluates_in_a_step() -> list[float]:
    """Losses of a loop that evaluates wherever it can: a forward pass alone leaves FSDP2's root whole. Every rank."""
    dist.init_process_group("gloo")
    model, before, settings = converted("none")
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(trained(model), lr=5e-3, eps=1e-6)
    merges, losses = attach(model, optimizer, settings, initial_weights=before), []

    def evaluate() -> None:
        with torch.no_grad():
            loss_of(model, batch(99))

    for step in range(STEPS):
        evaluate()
        merges.prepare()
        evaluate()
        loss = loss_of(model, batch(step, dist.get_rank(), 2))
        loss.backward()
        optimizer.step()
        evaluate()
        merges.finish()
        optimizer.zero_grad()
        total = loss.detach()
        dist.all_reduce(total)
        losses.append(float(total) / 2)
    return losses
