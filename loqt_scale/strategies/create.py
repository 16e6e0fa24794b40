"""Choosing the strategy: once, from the settings and the launcher's environment."""

from __future__ import annotations

import torch
from torch.distributed.distributed_c10d import Store

from loqt_scale.config import ParallelConfig, RunConfig
from loqt_scale.config.combinations import strategy_of
from loqt_scale.errors import ConfigError, UserError
from loqt_scale.process.environment import (
    OWN,
    Environment,
    is_bound_to_one_gpu,
    is_launched,
    launched_world_size,
    local_rank,
)
from loqt_scale.strategies.base import Strategy
from loqt_scale.strategies.ddp import DDP
from loqt_scale.strategies.fsdp import FSDP
from loqt_scale.strategies.registry import StrategyRequest, find_strategy, register_strategy
from loqt_scale.strategies.single import SINGLE
from loqt_scale.strategies.zero.config import check_zero_unused
from loqt_scale.strategies.zero.strategy import ZERO

for _kind in (SINGLE, DDP, FSDP, ZERO):
    register_strategy(_kind)


def resolve_strategy(config: ParallelConfig, environment: Environment = OWN) -> str:
    """The strategy's name; another package's is loaded, nothing is joined.

    Raises:
        ValueError: There is no such strategy, or it does not fit the launcher or its options.
    """
    world_size = launched_world_size(environment)
    kind = find_strategy(strategy_of(config, world_size))
    if config.options and not kind.takes_options:
        raise ConfigError(
            f"parallel.options has {', '.join(config.options)}, but the strategy '{kind.name}' takes no options; leave "
            "it out"
        )
    if not kind.launched and world_size > 1:
        raise UserError(
            f"parallel.strategy is '{kind.name}', but the launcher started {world_size} ranks; "
            "write parallel.strategy: fsdp (or ddp, or auto), or start one process: python launch/train.py"
        )
    if kind.launched and not is_launched(environment):
        raise UserError(
            f"parallel.strategy is '{kind.name}', but no launcher set RANK and WORLD_SIZE; "
            "start it with torchrun --standalone --nproc-per-node N launch/train.py ... (or deepspeed --num_gpus N, or "
            "mpirun -np N python), or write parallel.strategy: single"
        )
    return kind.name


def resolve_device(name: str, environment: Environment = OWN) -> torch.device:
    """`auto`, `cpu` or `cuda` as this rank's device.

    The GPU is that of LOCAL_RANK; or the only one that CUDA_VISIBLE_DEVICES shows this rank, as SLURM and other
    launchers bind tasks to GPUs.

    Raises:
        ValueError: cuda is asked for and not there, or there are more local ranks than GPUs.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("train.device is 'cuda', but torch sees no CUDA device; write train.device: cpu (or auto)")
    bound = is_bound_to_one_gpu(environment) and torch.cuda.device_count() == 1
    index = 0 if bound else local_rank(environment)
    if index >= torch.cuda.device_count():
        raise UserError(
            f"local rank {index} has no GPU of its own: {torch.cuda.device_count()} are visible; "
            "start as many ranks per node as GPUs, or write train.device: cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def create_strategy(config: RunConfig, *, device: torch.device, store: Store | None = None) -> Strategy:
    """Makes the strategy of a run and joins its ranks. Every rank.

    Args:
        config: The run.
        device: This rank's device.
        store: What only this job's ranks see (a roll call's); default: the launcher's.

    Raises:
        ValueError: Settings that cannot work, or the strategy's package is not installed; nothing has been joined yet.
    """
    name = resolve_strategy(config.parallel)
    config.parallel.check_offload(name)
    if name != ZERO.name:
        check_zero_unused(config.parallel)
    return find_strategy(name).create(StrategyRequest(config=config, device=device, store=store))
