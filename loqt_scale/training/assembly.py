"""The optimizer, the merges and the counted FLOPs of a run, made from its settings, its model and its strategy."""

from __future__ import annotations

import torch
from torch import nn

from loqt_scale.config import RunConfig
from loqt_scale.functional.shares import share
from loqt_scale.merge import MergeCoordinator
from loqt_scale.metrics import Throughput, peak_tflops
from loqt_scale.model.build import BuiltModel
from loqt_scale.model.flops import pass_flops
from loqt_scale.optim import create_optimizer
from loqt_scale.strategies import Editing, Placement, Strategy


def make_optimizer(built: BuiltModel, config: RunConfig, placement: Placement) -> torch.optim.Optimizer:
    """The optimizer over the rows that this rank stores. Local."""
    return create_optimizer(
        built.model,
        config.optim,
        built.dense_layers,
        local=placement.local,
        first_row=lambda parameter: placement.stored_rows(parameter)[0],
        seed=config.train.seed,
        streamed=config.streams_updates,
        shards=placement.row_shards,
    )


def make_merges(
    built: BuiltModel, optimizer: torch.optim.Optimizer, config: RunConfig, editing: Editing
) -> MergeCoordinator | None:
    """The merges of a run; None under `method: full`. Every rank."""
    if config.method != "loqt":
        return None
    return MergeCoordinator(
        built.model,
        optimizer,
        config.loqt,
        total_steps=config.train.steps,
        editing=editing,
        seed=config.train.seed,
        initial_weights=built.initial_weights,
    )


def make_throughput(model: nn.Module, config: RunConfig, strategy: Strategy) -> Throughput:
    """What tokens per second mean for the devices of a run; of its model before it is sharded. Local."""
    train, comm = config.train, strategy.comm
    start, stop = share(train.global_batch_size, 0, strategy.step.data_size)
    flops = pass_flops(
        model,
        sequences=max(1, min(train.micro_batch_size, stop - start)),
        seq_len=config.data.seq_len,
        recomputes=config.model.activation_checkpointing,
    )
    peak = train.peak_tflops
    if peak is None and comm.device.type == "cuda":
        peak = peak_tflops(torch.cuda.get_device_name(comm.device), config.model.dtype)
    return Throughput(flops.model / flops.tokens, flops.hardware / flops.tokens, comm.world_size, peak)
