"""A checkpoint as a model: its settings, its structure on the meta device, and its tokenizer, all from its own files.

Neither the hub, the tokenizer's cache nor the folder that the run started from is needed any more. It may be a
stranger's: libraries read a verified copy of its files, and nothing is allocated before its shapes are known to fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from loqt_scale.checkpoint import (
    HUGGINGFACE,
    Checkpoint,
    CheckpointError,
    check_tensors,
    load_checkpoint,
    locate_checkpoint,
    verify_checkpoint,
)
from loqt_scale.config import ParallelConfig, RunConfig
from loqt_scale.errors import UserError
from loqt_scale.model.architectures import declared_layers
from loqt_scale.model.build import ModelDesign, design_model, place_model
from loqt_scale.process.streams import warnings_of
from loqt_scale.strategies import Comm, Strategy

RUN_SETTINGS = "loqt_scale.yaml"  # in a folder that `loqt-scale export` writes: the settings of the run
_SPARE_LAYERS = 1000  # layers without tensors of their own that a model may have


@dataclass(frozen=True)
class SavedModel:
    """A verified checkpoint.

    Args:
        checkpoint: The checkpoint.
        config: The run's settings; model and tokenizer are the checkpoint's own files.
        design: The converted model on the meta device.
    """

    checkpoint: Checkpoint
    config: RunConfig
    design: ModelDesign

    @property
    def files(self) -> Path:
        """Folder of the model's and the tokenizer's files, as transformers reads them, as long as this object lives."""
        return self.checkpoint.side_files / HUGGINGFACE

    def load(self, strategy: Strategy) -> nn.Module:
        """The model with its values, spread as the strategy will have it, in eval mode. Every rank, once."""
        model = place_model(self.design, self.config.model, strategy.placement)
        load_checkpoint(self.checkpoint, model, None, strategy.editing)
        return model.eval()


def find_saved(path: Path) -> Path | None:
    """The checkpoint that a path means; None if it is the folder of a Hugging Face model.

    Raises:
        CheckpointError: Neither.
    """
    if (path / "config.json").is_file():
        return None
    return locate_checkpoint(path)


def saved_settings(checkpoint: Checkpoint) -> RunConfig:
    """The settings of the run that saved a checkpoint, with model and tokenizer from the checkpoint. Local.

    Raises:
        CheckpointError: It has no model and tokenizer files, or one of its side files is damaged.
    """
    files = checkpoint.side_files / HUGGINGFACE
    if not (files / "config.json").is_file():
        raise CheckpointError(
            f"{checkpoint.path} has no {HUGGINGFACE}/config.json: it was saved before such files were; save anew"
        )
    return self_contained(checkpoint.settings(), files)


def self_contained(config: RunConfig, files: Path) -> RunConfig:
    """A run's settings with model and tokenizer from a folder of both, and placement left to whoever uses them."""
    tokenizer = config.data.tokenizer if config.data.tokenizer == "bytes" else str(files)
    return replace(
        config,
        model=replace(config.model, path=str(files), weights="random", overrides={}),
        data=replace(config.data, tokenizer=tokenizer),
        parallel=ParallelConfig(timeout_seconds=config.parallel.timeout_seconds),
    )


def open_saved(checkpoint: Checkpoint, config: RunConfig, comm: Comm) -> SavedModel:
    """Designs a checkpoint's model, and verifies the checkpoint. Every rank.

    Args:
        checkpoint: The checkpoint.
        config: As `saved_settings` returned it, perhaps with other data.
        comm: The ranks that verify it.

    Raises:
        CheckpointError: It is damaged, or not what its manifest and settings say.
    """
    with warnings_of(comm.is_main):
        design = _design(checkpoint, config)
    check_tensors(checkpoint, design.model)
    verify_checkpoint(checkpoint, comm)
    return SavedModel(checkpoint, config, design)


def _design(checkpoint: Checkpoint, config: RunConfig) -> ModelDesign:
    """The converted model on the meta device, whatever the checkpoint's config.json asks for."""
    most = len(checkpoint.manifest.tensors) + _SPARE_LAYERS
    try:
        if (layers := declared_layers(str(config.model.path))) > most:
            raise UserError(f"{layers} layers cannot be made of {len(checkpoint.manifest.tensors)} tensors")
        return design_model(config, vocab_size=0)
    except Exception as error:  # a stranger's values end in any exception of transformers or torch
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{checkpoint.path}: its {HUGGINGFACE}/config.json makes no model ({reason})") from error
