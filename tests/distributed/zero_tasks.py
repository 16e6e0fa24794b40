"""Looks into a DeepSpeed engine after a merge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loqt_scale.layers import loqt_layers
from loqt_scale.strategies.zero import ZeroStrategy
from tests.distributed.footprint_tasks import make_trainer
from tests.distributed.tasks import small_config


def copies_after_merge(**settings: Any) -> list[dict[str, Tensor]]:
    """B of each layer after the second merge: `parameter`, `master`, `first` and `second` moment. Every rank."""
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    trainer = make_trainer(small_config(settings))
    strategy = trainer.strategy
    assert isinstance(strategy, ZeroStrategy) and trainer.merges is not None
    try:
        for step in range(trainer.merges.steps[1] + 1):
            trainer.step(step)
        copies = []
        for _, layer in loqt_layers(trainer.built.model):
            with zero.GatheredParameters([layer.factor]):
                parameter = layer.factor.detach().clone()
            found = {"parameter": parameter, "master": safe_get_full_fp32_param(layer.factor)}
            found["first"] = safe_get_full_optimizer_state(layer.factor, "exp_avg")
            found["second"] = safe_get_full_optimizer_state(layer.factor, "exp_avg_sq")
            copies.append({name: tensor.clone() for name, tensor in found.items()})
        return copies
    finally:
        strategy.close()


def packed_after_merge(**settings: Any) -> list[Tensor]:
    """Codes and scales of W and P of each layer after the first merge and a step, whole. Every rank."""
    trainer = make_trainer(small_config(settings))
    strategy = trainer.strategy
    assert trainer.merges is not None
    try:
        for step in (0, 1):
            trainer.step(step)
        tensors = []
        for _, layer in loqt_layers(trainer.built.model):
            with strategy.editing(layer.merged_parameters()):
                packed = [p for p in layer.merged_parameters() if p.dtype == torch.uint8]
                tensors.extend(strategy.gather(parameter).clone() for parameter in packed)
        return tensors
    finally:
        strategy.close()
