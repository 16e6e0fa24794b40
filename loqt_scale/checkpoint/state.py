"""The tensors of a run, whatever its strategy: each rank brings its share of every tensor's rows.

    model.NAME                  every parameter: packed bytes as bytes, what trains in float32 (under ZeRO the master)
    moments.NAME.first|second   the moments of what trains (Muon has no second), float32: exact for 8-bit states too,
                                see `blockwise`

A rank's share are the rows that it would work on in a merge (`Editing.rows`), on the host. FSDP2 stores just those;
DDP, which has all, writes 1/N of each tensor from every rank; ZeRO's shards, cut by elements, are gathered one tensor
at a time where they are no whole rows, and moments in any case. What is saved is a DTensor sharded on dim 0, whose
place in the whole torch.distributed.checkpoint writes down, so that any rows can be read by any number of ranks, under
any editing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from loqt_scale.strategies import Editing, whole_shape

Shares = dict[str, Tensor]
Outlines = Mapping[str, tuple[tuple[int, ...], str]]
MOMENTS = ("first", "second")


@torch.no_grad()
def read_state(model: nn.Module, optimizer: torch.optim.Optimizer, editing: Editing) -> Shares:
    """Copies this rank's shares to the host. Every rank."""
    shares: Shares = {}
    for name, parameter in model.named_parameters():
        shape = whole_shape(parameter)
        mine = editing.read(parameter)
        shares[f"model.{name}"] = _share(mine.float() if parameter.requires_grad else mine, shape, editing)
        if parameter.requires_grad:
            moments = editing.read_moments(optimizer, parameter)
            for key, moment in zip(MOMENTS, moments or (), strict=False):
                shares[f"moments.{name}.{key}"] = _share(moment, shape, editing)
    return shares


def expected_state(model: nn.Module, *, moments: bool, momentum_only: Collection[str] = ()) -> Outlines:
    """What a checkpoint of a model holds. Local; the model may be on the meta device, or spread over ranks.

    Args:
        model: The model.
        moments: Whether the checkpoint holds moments.
        momentum_only: Parameters that have no second one (see `optim.momentum_only`).
    """
    outlines: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, parameter in model.named_parameters():
        shape, trains = tuple(whole_shape(parameter)), parameter.requires_grad
        outlines[f"model.{name}"] = (shape, "float32" if trains else _dtype_name(parameter))
        if trains and moments:
            keys = MOMENTS[:1] if name in momentum_only else MOMENTS
            outlines |= {f"moments.{name}.{key}": (shape, "float32") for key in keys}
    return outlines


@torch.no_grad()
def write_state(shares: Shares, model: nn.Module, optimizer: torch.optim.Optimizer | None, editing: Editing) -> None:
    """Puts rows, on the host, where they belong; without an optimizer, parameters only. Every rank.

    Args:
        shares: This rank's `Editing.rows_to_fill` of every tensor.
        model: The model.
        optimizer: Its optimizer.
        editing: How both are spread.
    """
    local: Callable[[str], Tensor] = lambda name: shares[name].to(editing.device)  # noqa: E731
    for name, parameter in model.named_parameters():
        editing.fill(parameter, local(f"model.{name}"))
        if optimizer is not None and f"moments.{name}.{MOMENTS[0]}" in shares:
            keys = [f"moments.{name}.{key}" for key in MOMENTS]
            editing.fill_moments(optimizer, parameter, [local(key) for key in keys if key in shares])


def describe(shares: Shares) -> Outlines:
    """Shape and dtype of each tensor, as a manifest holds them."""
    return {name: (tuple(share.shape), _dtype_name(share)) for name, share in shares.items()}


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _share(piece: Tensor, shape: torch.Size, editing: Editing) -> Tensor:
    return editing.as_shard(piece.detach().to("cpu", copy=True).contiguous(), shape)
