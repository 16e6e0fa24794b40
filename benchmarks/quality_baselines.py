"""Optimizers of other hands over the product's full-rank model: Muon, GaLore, APOLLO.

Each takes the place of a trainer's optimizer; schedule, clipping and all else stay the trainer's.
"""

from __future__ import annotations

from typing import Any

import torch
from common import ROOT  # noqa: F401
from quality_runs import OPTIONS

from loqt_scale.optim import create_scheduler
from loqt_scale.training.trainer import Trainer


class InParts(torch.optim.Optimizer):
    """Several optimizers as one, each with parameters of its own.

    Args:
        parts: They share one `state` from now on.
    """

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        super().__init__([{"params": part.param_groups[0]["params"]} for part in parts], {})
        self.param_groups = [group for part in parts for group in part.param_groups]  # a schedule changes them in place
        self.parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of each."""
        assert closure is None
        for part in self.parts:
            part.step()


def use_optimizer(trainer: Trainer, method: str, options: dict[str, Any]) -> None:
    """Replaces the optimizer of a full-rank trainer that has not taken a step.

    Args:
        trainer: Under `--method full`, strategy single.
        method: A key of `OPTIONS`; anything else leaves the trainer's own.
        options: Wins over `OPTIONS`.
    """
    if method not in OPTIONS:
        return
    optim = trainer.config.optim
    rates = {"low_rank": optim.lr, "full_precision": optim.full_precision_lr}
    groups = [
        {"params": group["params"], "name": group["name"], "lr": rates[group["name"]]}
        for group in trainer.optimizer.param_groups
    ]
    trainer.optimizer = _create(trainer, method, OPTIONS[method] | options, *groups)
    trainer.scheduler = create_scheduler(trainer.optimizer, optim, trainer.config.train.steps)


def _create(
    trainer: Trainer, method: str, options: dict[str, Any], linears: dict[str, Any], rest: dict[str, Any]
) -> torch.optim.Optimizer:
    optim = trainer.config.optim
    adam: dict[str, Any] = {"betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    if method == "muon":
        return InParts([torch.optim.Muon([linears], **options), torch.optim.AdamW([rest], **adam, fused=True)])
    groups = [{**linears, "rank": trainer.config.loqt.rank, **options}, rest]
    if method == "galore":
        from galore_torch import GaLoreAdamW

        return GaLoreAdamW(groups, **adam, no_deprecation_warning=True)
    from apollo_torch import APOLLOAdamW

    return APOLLOAdamW(groups, **adam)
