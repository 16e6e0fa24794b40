"""The tensors of a run, whatever its strategy: each rank brings its share of every tensor's rows.

    model.NAME                  every parameter: packed bytes as bytes, what trains in float32 (under ZeRO the master)
    moments.NAME.first|second   Adam's moments of what trains, float32 (exact for 8-bit states too, see `blockwise`)

A rank's share are the rows that it would work on in a merge (`Strategy.rows`), on the host. FSDP2 stores just those;
DDP, which has all, writes 1/N of each tensor from every rank; ZeRO's shards, cut by elements, are gathered one tensor
at a time. A share is a DTensor sharded on dim 0, so torch.distributed.checkpoint can hand any rows to any number of
ranks, under any strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from loqt_scale.strategies import Strategy

Shares = dict[str, Tensor]
Outlines = Mapping[str, tuple[tuple[int, ...], str]]
MOMENTS = ("first", "second")


@torch.no_grad()
def read_state(model: nn.Module, optimizer: torch.optim.Optimizer, strategy: Strategy) -> Shares:
    """Copies this rank's shares to the host. Every rank."""
    shares: Shares = {}
    for name, parameter in model.named_parameters():
        with strategy.editing([parameter]):
            shape = parameter.shape
            mine = strategy.read(parameter)
            shares[f"model.{name}"] = _share(mine.float() if parameter.requires_grad else mine, shape, strategy)
        if parameter.requires_grad:
            moments = strategy.read_moments(optimizer, parameter)
            for key, moment in zip(MOMENTS, moments or (), strict=False):
                shares[f"moments.{name}.{key}"] = _share(moment, shape, strategy)
    return shares


@torch.no_grad()
def empty_state(model: nn.Module, strategy: Strategy, *, moments: bool) -> Shares:
    """Shares to load into, of the same names, shapes and dtypes. Every rank.

    Args:
        model: The model.
        strategy: How it is spread.
        moments: Whether the checkpoint holds Adam's moments.
    """
    shares: Shares = {}
    for name, parameter in model.named_parameters():
        with strategy.editing([parameter]):
            shape, dtype = parameter.shape, torch.float32 if parameter.requires_grad else parameter.dtype
        start, stop = strategy.rows(shape[0])

        def share(kind: torch.dtype, rows: int = stop - start, shape: torch.Size = shape) -> Tensor:
            return _share(torch.empty((rows, *shape[1:]), dtype=kind), shape, strategy)

        shares[f"model.{name}"] = share(dtype)
        if parameter.requires_grad and moments:
            shares |= {f"moments.{name}.{key}": share(torch.float32) for key in MOMENTS}
    return shares


@torch.no_grad()
def write_state(shares: Shares, model: nn.Module, optimizer: torch.optim.Optimizer | None, strategy: Strategy) -> None:
    """Puts loaded shares where they belong; without an optimizer, parameters only. Every rank."""
    local: Callable[[str], Tensor] = lambda name: strategy.from_shard(shares[name]).to(strategy.device)  # noqa: E731
    for name, parameter in model.named_parameters():
        with strategy.editing([parameter]):
            strategy.write(parameter, local(f"model.{name}"))
        if optimizer is not None and f"moments.{name}.{MOMENTS[0]}" in shares:
            first, second = (local(f"moments.{name}.{key}") for key in MOMENTS)
            strategy.write_moments(optimizer, parameter, (first, second))


def describe(shares: Shares) -> Outlines:
    """Shape and dtype of each tensor, as a manifest holds them."""
    return {name: (tuple(share.shape), str(share.dtype).removeprefix("torch.")) for name, share in shares.items()}


def _share(piece: Tensor, shape: torch.Size, strategy: Strategy) -> Tensor:
    return strategy.as_shard(strategy.local(piece.detach()).to("cpu", copy=True).contiguous(), shape)
