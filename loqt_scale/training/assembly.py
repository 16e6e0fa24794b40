"""The optimizer and the merges of a run, made from its settings, its built model and its strategy."""

from __future__ import annotations

import torch

from loqt_scale.config import RunConfig
from loqt_scale.merge import MergeCoordinator
from loqt_scale.model.build import BuiltModel
from loqt_scale.optim import create_optimizer
from loqt_scale.strategies import Editing, Placement


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
    """The merges of a run; None under `--method full`. Every rank."""
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
