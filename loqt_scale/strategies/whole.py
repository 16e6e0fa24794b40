"""Whole tensors of a model that somebody sharded, read one module at a time, and what the sharding left on its modules.

Needs no `Editing`: it looks at the tensors themselves. FSDP2's are DTensors, ZeRO-3's know DeepSpeed by themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor


def reshard(model: nn.Module) -> None:
    """Frees what a forward pass without a backward pass left gathered, in the dtype of computation. Local."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a part only."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of the whole, of which this rank may hold a part only. Local."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)  # ZeRO-3 leaves an empty tensor in its place
    return shape


def is_in_fsdp(model: nn.Module) -> bool:
    """Whether FSDP has a model in its hands: `fully_shard`, or FSDP1, which is refused elsewhere. Local."""
    wrapped = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    return wrapped or any(isinstance(parameter, DTensor) for parameter in model.parameters())


@contextmanager
def whole(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """These tensors as whole plain ones, to be read until the context ends. Every rank, if any is sharded."""
    gathered = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not gathered:
        yield [tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach() for tensor in tensors]
        return
    with sys.modules["deepspeed"].zero.GatheredParameters(gathered):
        yield [tensor.detach() for tensor in tensors]


def unsharded_class(module: nn.Module) -> type[nn.Module]:
    """A module's class without what `fully_shard` mixed in."""
    kind = type(module)
    return kind.__bases__[1] if issubclass(kind, FSDPModule) and kind.__bases__[0] is FSDPModule else kind


def is_of_engine(hook: Callable[..., Any]) -> bool:
    """Whether a module's hook belongs to FSDP2 or DeepSpeed; checkpoint_wrapper's belongs to the model."""
    home = getattr(hook, "__module__", None) or ""
    return home.startswith(("torch.distributed.", "deepspeed.")) and "checkpoint_wrapper" not in home


def is_first_rank() -> bool:
    """Whether this process writes what is written once."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def all_succeeded(succeeded: bool, device: torch.device | None) -> bool:
    """Whether all ranks say so; waits for them. Every rank.

    Args:
        succeeded: What this one says.
        device: Where it computes; None: there are no others to ask.
    """
    if device is None or not (dist.is_available() and dist.is_initialized()):
        return succeeded
    flag = torch.tensor(int(succeeded), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())
