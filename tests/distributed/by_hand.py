"""A strategy as another package would hold it: DDP whose gradients are summed by hand after the last pass."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loqt_scale.errors import ConfigError
from loqt_scale.strategies import (
    Comm,
    GroupComm,
    OptimizerStep,
    Placement,
    ReplicaEditing,
    Replicated,
    Strategy,
    StrategyKind,
    StrategyRequest,
)
from tests.distributed.tasks import train_run


class ByHandStep(OptimizerStep):
    """A rank's gradients, tensor by tensor or all in one, are summed over ranks.

    Args:
        together: All in one.
    """

    def __init__(self, comm: Comm, placement: Placement, compute_dtype: torch.dtype, *, together: bool) -> None:
        super().__init__(comm, placement, compute_dtype)
        self._together = together
        self._parameters: list[nn.Parameter] = []

    def wrap(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return model

    @contextmanager
    def micro_step(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        with super().micro_step(model, last=last):
            yield
        if last:
            self._sum_gradients([p.grad for p in self._parameters if p.grad is not None])

    def norm(self, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        norm = self.stored_norm(parameters)
        self.comm.broadcast(norm, 0)  # all clip by one norm, and skip a step together
        return norm

    def _sum_gradients(self, gradients: list[Any]) -> None:
        if not self._together:
            for gradient in gradients:
                gradient.copy_(self.comm.sum(gradient))  # in place where it can: else the sum is a copy
            return
        summed = self.comm.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, summed.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def create(request: StrategyRequest) -> Strategy:
    options = dict(request.parallel.options)
    together = options.pop("together", False)
    if options:
        raise ConfigError(f"parallel.options has {', '.join(options)}; by_hand knows together")
    comm = GroupComm(request.device, request.parallel.timeout_seconds, store=request.store)
    placement = Replicated(request.device)
    step = ByHandStep(comm, placement, request.compute_dtype, together=together)
    editing = ReplicaEditing(comm, placement)
    return Strategy(description="ddp by hand", comm=comm, placement=placement, step=step, editing=editing)


BY_HAND = StrategyKind(name="by_hand", create=create, takes_options=True)


def install(folder: Path) -> None:
    """What pip would leave of the package in a folder of its modules, as far as it is asked for."""
    about = folder / "by_hand-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: by-hand\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[loqt_scale.strategies]\nby_hand = {__name__}:BY_HAND\n")


def train_where_installed(folder: str, **settings: Any) -> list[dict[str, float]]:
    """`train_run` in a process that finds packages in a folder, too. Every rank."""
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        return train_run(**settings)
    finally:
        sys.path.remove(folder)
