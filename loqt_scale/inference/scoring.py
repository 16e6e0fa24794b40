"""Held-out loss of a checkpoint or of a Hugging Face folder.

A checkpoint is used as it was trained, quantized and unmerged, so its loss is the run's own. A folder (what `loqt-scale
export` wrote, or any other causal language model) is loaded by transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loqt_scale.checkpoint import Checkpoint, read_settings
from loqt_scale.config import DataConfig, RunConfig
from loqt_scale.config.keys import flat_settings
from loqt_scale.config.paths import same_files
from loqt_scale.data import Corpus, build_corpus
from loqt_scale.data.batching import counted_tokens
from loqt_scale.errors import ConfigError, UserError
from loqt_scale.inference.saved_model import RUN_SETTINGS, find_saved, open_saved, saved_settings, self_contained
from loqt_scale.metrics import format_count, perplexity
from loqt_scale.model.documents import attend, check_documents
from loqt_scale.model.hf_folder import load_folder
from loqt_scale.model.loss import end_in_loss
from loqt_scale.process.environment import launched_world_size
from loqt_scale.strategies import create_strategy, find_strategy, resolve_device
from loqt_scale.training.evaluation import evaluate_corpus

# what may be changed; the rest is the model's own
_OPEN = ("data.", "parallel.", "train.device", "train.micro_batch_size", "model.dtype")


def evaluate_saved(location: str, override: Callable[[RunConfig], RunConfig] = lambda settings: settings) -> float:
    """Prints and returns the held-out loss in nats per token. Every rank; ranks share the work on a checkpoint.

    Args:
        location: A checkpoint's folder, a run's for its latest, or a Hugging Face model's.
        override: Changes the settings of the run, other text say.

    Raises:
        ConfigError: A setting that belongs to the model; several ranks for a Hugging Face folder.
        CheckpointError: The checkpoint is missing or damaged.
    """
    path = find_saved(Path(location))
    saved = None if path is None else Checkpoint(path)
    settings = _folder_settings(Path(location)) if saved is None else saved_settings(saved)
    config = override(settings)
    _check_changes(settings, config)
    name = config.parallel.strategy
    if name != "auto" and find_strategy(name).only_trains:
        raise ConfigError(f"parallel.strategy is '{name}', which only trains; write fsdp, ddp or auto")
    device = resolve_device(config.train.device)
    if saved is None and (ranks := launched_world_size()) > 1:
        raise ConfigError(f"{location} is a Hugging Face model, which one process scores, not {ranks}; start one")
    strategy = create_strategy(config, device=device)
    try:
        corpus = build_corpus(config.data, seed=config.train.seed, global_batch_size=config.train.global_batch_size)
        if saved is None:
            model: nn.Module = load_folder(Path(location), device, torch.float32)
            check_documents(config.data, model.config)
            end_in_loss(model, chunk=0)
        else:
            model = open_saved(saved, config, strategy.comm).load(strategy)
        _check_tokens(model, corpus)
        if config.data.mask_documents:
            attend(model, config.data, separator=corpus.tokenizer.eos_token_id, warns=strategy.comm.is_main)
        size = config.train.micro_batch_size
        loss, losses = evaluate_corpus(model, corpus, step=strategy.step, micro_batch_size=size)
        if not math.isfinite(loss):
            raise UserError(f"{location}: the loss is {loss}, though every weight is a number: the model overflows")
        if strategy.comm.is_main:
            tokens = format_count(counted_tokens(corpus.eval.labels))
            print(f"{path or location}\ndata     {corpus.description}")
            said = (
                f"perplexity {perplexity(loss):.4f}, {corpus.bits_per_byte(loss):.4f} bits per byte ({tokens} tokens)"
            )
            print(f"loss     {loss:.6f} nats per token, {said}", flush=True)
            for name, value in losses.items():
                print(f"         {name}: {value:.6f}, perplexity {perplexity(value):.4f}", flush=True)
        return loss
    finally:
        strategy.close()


def _check_tokens(model: Any, corpus: Corpus) -> None:
    """Raises ValueError if the tokenizer gives ids that the model has no embedding for."""
    greatest, known = int(corpus.eval.input_ids.max()), model.config.get_text_config().vocab_size
    if greatest >= known:
        raise UserError(f"the tokenizer {corpus.tokenizer.name} gives token {greatest}, but the model knows {known}")


def _folder_settings(path: Path) -> RunConfig:
    """The settings of the run that a folder was exported from, or the defaults; the tokenizer is the folder's."""
    known = path / RUN_SETTINGS
    config = read_settings(known) if known.is_file() else RunConfig(data=DataConfig(tokenizer=str(path)))
    return self_contained(config, path)


def _check_changes(settings: RunConfig, config: RunConfig) -> None:
    """Raises ConfigError if a setting has changed that is not for an evaluation to change."""
    old, new = flat_settings(settings), flat_settings(config)
    changed = [key for key in new if new[key] != old[key]]
    for key in changed:
        if key == "data.tokenizer" and same_files(old[key], new[key]):
            continue
        if key == "data.tokenizer" or not key.startswith(_OPEN):
            raise ConfigError(f"{key} is the model's and stays {old[key]!r}; eval takes {', '.join(_OPEN)}")
