"""A checkpoint as a model: its settings, its structure on the meta device, and its tokenizer, all from its own folder.

Neither the hub, the tokenizer's cache nor the folder that the run started from is needed any more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from loqt_scale.build import ModelDesign, design_model, place_model
from loqt_scale.checkpoint import (
    CONFIG,
    HUGGINGFACE,
    CheckpointError,
    Manifest,
    load_checkpoint,
    locate_checkpoint,
    read_manifest,
    verify_checkpoint,
)
from loqt_scale.config import ParallelConfig, RunConfig
from loqt_scale.config_io import load_run_config
from loqt_scale.strategies import Strategy

# in a folder that `loqt-scale export` writes: the settings of the run, and the adapter of format nf4
RUN_SETTINGS, ADAPTER = "loqt_scale.yaml", "adapter"


@dataclass(frozen=True)
class SavedModel:
    """A verified checkpoint.

    Args:
        path: Its folder.
        manifest: Its manifest.
        config: The run's settings; model and tokenizer are the checkpoint's own files.
        design: The converted model on the meta device.
    """

    path: Path
    manifest: Manifest
    config: RunConfig
    design: ModelDesign

    @property
    def files(self) -> Path:
        """Folder of the model's and the tokenizer's files, as transformers reads them."""
        return self.path / HUGGINGFACE

    def load(self, strategy: Strategy) -> nn.Module:
        """The model with its values, spread as the strategy will have it, in eval mode. Every rank, once."""
        model = place_model(self.design, self.config.model, strategy)
        load_checkpoint(self.path, self.manifest, model, None, strategy)
        return model.eval()


def find_saved(path: Path) -> Path | None:
    """The checkpoint that a path means; None if it is the folder of a Hugging Face model.

    Raises:
        CheckpointError: Neither.
    """
    if (path / "config.json").is_file():
        return None
    return locate_checkpoint(path)


def saved_settings(path: Path) -> RunConfig:
    """The settings of the run that saved a checkpoint, with model and tokenizer from the checkpoint. Local.

    Raises:
        CheckpointError: It has no model and tokenizer files.
    """
    read_manifest(path)
    files = path / HUGGINGFACE
    if not (files / "config.json").is_file():
        raise CheckpointError(
            f"{path} has no {HUGGINGFACE}/config.json: it was saved before such files were; save anew"
        )
    return self_contained(load_run_config(path / CONFIG), files)


def self_contained(config: RunConfig, files: Path) -> RunConfig:
    """A run's settings with model and tokenizer from a folder of both, and placement left to whoever uses them."""
    tokenizer = config.data.tokenizer if config.data.tokenizer == "bytes" else str(files)
    return replace(
        config,
        model=replace(config.model, path=str(files), weights="random", overrides={}),
        data=replace(config.data, tokenizer=tokenizer),
        parallel=ParallelConfig(timeout_seconds=config.parallel.timeout_seconds),
    )


def open_saved(path: Path, config: RunConfig, strategy: Strategy) -> SavedModel:
    """Verifies a checkpoint and designs its model. Every rank.

    Args:
        path: Its folder.
        config: As `saved_settings` returned it, perhaps with other data.
        strategy: Of the ranks that verify it.

    Raises:
        CheckpointError: It is damaged.
    """
    manifest = verify_checkpoint(path, strategy)
    return SavedModel(path, manifest, config, design_model(config, vocab_size=0))
