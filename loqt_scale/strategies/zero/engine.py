"""The DeepSpeed engine that ZeRO's four parts share: DeepSpeed itself, its configuration, what it makes of a model."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from loqt_scale.config import RunConfig
from loqt_scale.errors import UserError
from loqt_scale.optim import Fragment, StreamedAdamW
from loqt_scale.process.environment import tell_deepspeed
from loqt_scale.strategies.zero.config import deepspeed_config, size_buckets
from loqt_scale.strategies.zero.flat import master_fragments, shapes_only


def import_deepspeed(device: torch.device, log_level: str) -> ModuleType:
    """DeepSpeed, set up for this device and quiet.

    Args:
        device: Where this rank computes: DeepSpeed must not pick another one by itself.
        log_level: Least severe messages of DeepSpeed that are shown.

    Raises:
        ValueError: It is not installed.
    """
    tell_deepspeed(device.type, device.index)
    try:
        import deepspeed
        from deepspeed.utils.logging import logger
    except ModuleNotFoundError as error:
        raise UserError(
            f"parallel.strategy is 'zero', but {error.name} is not installed; "
            "run pip install 'loqt-scale[deepspeed]', or write parallel.strategy: fsdp"
        ) from None
    logger.setLevel(log_level.upper())
    for handler in logger.handlers:
        handler.setLevel(log_level.upper())
    if log_level == "error":  # torch 2.13 renamed the collectives that DeepSpeed 0.19 calls, and says so at every call
        renamed = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
        warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)
    # Its shared-memory all-reduce for CPUs is compiled at the first run and leaves tens of megabytes in /dev/shm for
    # each rank of every run. DeepSpeed looks the operator up in this table; gloo serves without it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class RunningEngine:
    """DeepSpeed's own engine, and what merges must know of it.

    Args:
        deepspeed: DeepSpeed.
        stage: 1, 2 or 3.
        running: DeepSpeed's own engine; None: it is not started yet.

    Attributes:
        fragments: By id of the parameter, what this rank's flat tensors hold of it, if the moments are a
            StreamedAdamW's.
    """

    def __init__(self, deepspeed: Any, stage: int, running: Any = None) -> None:
        self.deepspeed, self.stage, self.running = deepspeed, stage, running
        self.fragments: dict[int, Fragment] = {}

    def tell_fragments(self, optimizer: Optimizer, rank: int) -> None:
        """Lets a StreamedAdamW know what the flat tensors hold that the running engine gave it. Local."""
        if isinstance(optimizer, StreamedAdamW):
            for flat, fragments in master_fragments(self.running, self.stage, rank):
                optimizer.adopt(flat, fragments)
                self.fragments |= {id(fragment.parameter): fragment for fragment in fragments if fragment.values}


class ZeroEngine(RunningEngine):
    """An engine to be: `settle` its configuration for a model, then `start` it.

    Args:
        deepspeed: DeepSpeed (see `import_deepspeed`).
        config: The run; its settings become DeepSpeed's (see `config`).
        world_size: Ranks of the run.

    Raises:
        ConfigError: They cannot.

    Attributes:
        settings: DeepSpeed's configuration; sizes of buckets once there is a model.
    """

    def __init__(self, deepspeed: Any, config: RunConfig, *, world_size: int) -> None:
        self.settings = deepspeed_config(config, world_size=world_size)
        super().__init__(deepspeed, int(self.settings["zero_optimization"]["stage"]))

    def settle(self, trained_values: int) -> None:
        """Sizes buckets, which need not be larger than what trains. Local."""
        size_buckets(self.settings, trained_values)

    def start(self, model: nn.Module, optimizer: Optimizer, rank: int) -> None:
        """Gives DeepSpeed the model, and the optimizer's parameters; its groups' settings stay. Every rank."""
        with shapes_only(model):
            self.running, _, _, _ = self.deepspeed.initialize(
                model=model, optimizer=optimizer, config=self.settings, dist_init_required=False
            )
        self.tell_fragments(optimizer, rank)

    def stop(self) -> None:
        """Takes the engine's hooks off. Every rank."""
        if self.running is not None:
            self.running.destroy()
            self.running = None
