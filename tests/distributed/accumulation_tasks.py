"""What the rank processes measure of a step's gradients: how far their sum over passes is from the exact one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from loqt_scale.strategies import Step
from loqt_scale.strategies.ddp import DDPStep
from loqt_scale.strategies.fsdp import FSDPStep
from loqt_scale.training.trainer import Trainer
from tests.distributed.footprint_tasks import make_trainer
from tests.distributed.tasks import small_config


def summed_gradients(**settings: Any) -> dict[str, float]:
    """Takes a step with its merge, then the passes of the next. Every rank.

    Returns:
        By kind (B, and what else trains), the norm of the error of the summed gradients over that of the exact sum.
    """
    trainer = make_trainer(small_config(settings))
    try:
        trainer.step(0)
        trainer.finish_pending()
        trainer.accumulate(1)
        got = {p: trainer.strategy.placement.local(p.grad).double() for p in trainer.parameters if p.grad is not None}
        trainer.optimizer.zero_grad(set_to_none=True)
        exact = exact_sums(trainer)
        return {kind: _error(trainer.strategy.step, got, exact, group) for kind, group in _groups(trainer).items()}
    finally:
        trainer.strategy.close()


def exact_sums(trainer: Trainer) -> dict[Tensor, Tensor]:
    """Float64 sums, over passes and ranks, of every pass's gradients as they come; of the rows that a rank stores."""
    local, step, sums = trainer.strategy.placement.local, trainer.strategy.step, dict[Tensor, Tensor]()
    step.sums = None

    def take(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = local(parameter.grad).double()
        sums[parameter] = sums[parameter].add_(gradient) if parameter in sums else gradient
        parameter.grad = None

    for parameter in trainer.parameters:
        parameter.register_post_accumulate_grad_hook(take)
    if isinstance(step, FSDPStep):
        step._kept = "nothing"
    if isinstance(step, DDPStep):
        step.micro_step = lambda model, *, last: model.no_sync()  # type: ignore[method-assign]
    passes = step.sum_step
    step.sum_step = lambda numbers, _: numbers  # type: ignore[method-assign]
    trainer.accumulate(1)
    step.sum_step = passes  # type: ignore[method-assign]
    for parameter in trainer.parameters if isinstance(step, DDPStep) else ():
        dist.all_reduce(sums[parameter])
    return sums


def _groups(trainer: Trainer) -> dict[str, list[Tensor]]:
    return {group["name"]: group["params"] for group in trainer.optimizer.param_groups}


def _error(step: Step, got: dict[Tensor, Tensor], exact: dict[Tensor, Tensor], group: list[Tensor]) -> float:
    """Over the rows of all ranks."""
    pairs = [(got[p], exact[p]) for p in group]
    squares = torch.stack([sum((a - b).square().sum() for a, b in pairs), sum(b.square().sum() for _, b in pairs)])
    if isinstance(step, FSDPStep):
        dist.all_reduce(squares)
    return float((squares[0] / squares[1]).sqrt())
