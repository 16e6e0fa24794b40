"""Runs of ZeRO with a DeepSpeed JSON, and what becomes of them."""

from __future__ import annotations

import pytest

from loqt_scale.config import ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from loqt_scale.errors import ConfigError
from loqt_scale.strategies.zero.config import deepspeed_config

WORLD_SIZE = 2


def run(*, dtype="float32", optim=None, train=None, strategy="zero", **parallel) -> RunConfig:
    """A run whose batch of 32 makes 2 micro-steps of 8 on each of 2 ranks."""
    return RunConfig(
        model=ModelConfig(dtype=dtype),
        optim=OptimConfig(**(optim or {})),
        parallel=ParallelConfig(strategy=strategy, **parallel),
        train=TrainConfig(**(train or {})),
    )


def resolved(config: RunConfig, world_size: int = WORLD_SIZE) -> dict:
    return deepspeed_config(config, world_size=world_size)


def refusal(config: RunConfig) -> str:
    """The message of a refused run: one line."""
    with pytest.raises(ConfigError) as caught:
        resolved(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)
