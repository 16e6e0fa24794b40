"""Trained models in use: held-out loss and generated text, of a checkpoint or of a Hugging Face folder.

A checkpoint is used as it was trained, quantized and unmerged, so its held-out loss is the run's own. A folder (what
`loqt-scale export` wrote, or any other causal language model) is loaded by transformers.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TextStreamer

from loqt_scale.checkpoint import Checkpoint, read_settings
from loqt_scale.config import DataConfig, RunConfig
from loqt_scale.config.commands import GenerateOptions
from loqt_scale.config.keys import flat_settings
from loqt_scale.config.paths import same_files
from loqt_scale.config.yaml import parse_run_config, save_run_config
from loqt_scale.data import Corpus, build_corpus
from loqt_scale.data.batching import counted_tokens
from loqt_scale.errors import ConfigError, UserError, explained
from loqt_scale.inference.saved_model import (
    ADAPTER,
    RUN_SETTINGS,
    find_saved,
    open_saved,
    saved_settings,
    self_contained,
)
from loqt_scale.metrics import format_count, perplexity
from loqt_scale.model.hf_folder import CAREFULLY, check_folder, load_adapter, refuse_not_finite
from loqt_scale.process.environment import launched_world_size
from loqt_scale.strategies import Strategy, create_strategy, resolve_device
from loqt_scale.training.evaluation import evaluate

# what `eval` may be told; the rest is the model's own
_OPEN = ("data.", "parallel.", "train.device", "train.micro_batch_size", "model.dtype")


def evaluate_saved(location: str, argv: Sequence[str]) -> float:
    """Prints and returns the held-out loss in nats per token. Every rank; ranks share the work on a checkpoint.

    Args:
        location: A checkpoint's folder, a run's for its latest, or a Hugging Face model's.
        argv: Settings that differ from the run's, `--data.files other.txt` say.

    Raises:
        ConfigError: A setting that belongs to the model; several ranks for a Hugging Face folder.
        CheckpointError: The checkpoint is missing or damaged.
    """
    path = find_saved(Path(location))
    saved = None if path is None else Checkpoint(path)
    settings = _folder_settings(Path(location)) if saved is None else saved_settings(saved)
    config = _override(settings, argv)
    if config.parallel.strategy == "zero":
        raise ConfigError("parallel.strategy is 'zero', which only trains; write fsdp, ddp or auto")
    device = resolve_device(config.train.device)
    if saved is None and (ranks := launched_world_size()) > 1:
        raise ConfigError(f"{location} is a Hugging Face model, which one process scores, not {ranks}; start one")
    strategy = create_strategy(config, device=device)
    try:
        corpus = build_corpus(config.data, seed=config.train.seed, global_batch_size=config.train.global_batch_size)
        if saved is None:
            model: nn.Module = _load_folder(Path(location), device, torch.float32)
        else:
            model = open_saved(saved, config, strategy).load(strategy)
        _check_tokens(model, corpus)
        loss = evaluate(model, corpus.eval, strategy=strategy, micro_batch_size=config.train.micro_batch_size)
        if not math.isfinite(loss):
            raise UserError(f"{location}: the loss is {loss}, though every weight is a number: the model overflows")
        if strategy.is_main:
            tokens = format_count(counted_tokens(corpus.eval.labels))
            print(f"{path or location}\ndata     {corpus.description}")
            print(
                f"loss     {loss:.6f} nats per token, perplexity {perplexity(loss):.4f} ({tokens} tokens)", flush=True
            )
        return loss
    finally:
        strategy.close()


def generate(options: GenerateOptions) -> str:
    """Prints a continuation as it grows, and returns prompt and continuation. One process.

    Raises:
        ValueError: More tokens than the model has positions; several ranks.
        CheckpointError: The checkpoint is missing or damaged.
    """
    if launched_world_size() > 1:
        raise ConfigError("generate runs in one process; start it without a launcher")
    location, device = Path(options.checkpoint), resolve_device(options.device)
    path = find_saved(location)
    if path is None:
        strategy, files = Strategy(device), location
        model: Any = _load_folder(location, device, "auto")
    else:
        checkpoint = Checkpoint(path)
        config = saved_settings(checkpoint)
        strategy = create_strategy(config, device=device)
        saved = open_saved(checkpoint, config, strategy)
        model, files = saved.load(strategy), saved.files
    with explained(f"the tokenizer in {files} cannot be read"):
        tokenizer: Any = AutoTokenizer.from_pretrained(files, **CAREFULLY)
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
        ids = tokenizer(options.prompt, add_special_tokens=False)["input_ids"] or [end]
    if None in ids:
        raise UserError(f"the tokenizer in {files} has no end of text to start from; write --prompt TEXT")
    text_config = model.config.get_text_config()
    if max(ids) >= text_config.vocab_size:
        raise UserError(
            f"the tokenizer in {files} gives the token {max(ids)}, but the model knows {text_config.vocab_size}"
        )
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and len(ids) + options.max_new_tokens > positions:
        raise ConfigError(
            f"the prompt's {len(ids)} tokens and max_new_tokens {options.max_new_tokens} are more than the model's "
            f"{positions} positions; write a shorter prompt or fewer tokens"
        )
    torch.manual_seed(options.seed)
    sampling = {"temperature": options.temperature, "top_p": options.top_p} if options.temperature > 0 else {}
    with torch.no_grad(), strategy.autocast():
        result = model.generate(
            torch.tensor([ids], device=device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=device),
            do_sample=bool(sampling),
            **sampling,
            max_new_tokens=options.max_new_tokens,
            use_cache=True,
            eos_token_id=end,
            pad_token_id=end,
            # rows of the embedding that only round its size up
            suppress_tokens=list(range(len(tokenizer), text_config.vocab_size)) or None,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        )
    return str(tokenizer.decode(result[0], skip_special_tokens=True))


def _load_folder(path: Path, device: torch.device, dtype: torch.dtype | str) -> Any:
    """A Hugging Face model in eval mode, with the adapter beside it if there is one.

    Raises:
        UserError: The folder is not a whole one, or needs packages that are not installed.
    """
    with explained(f"{path} cannot be read as a Hugging Face model"):
        hf_config = AutoConfig.from_pretrained(path, **CAREFULLY)
        check_folder(path, hf_config)
        quantized = hasattr(hf_config, "quantization_config")
        # a quantized model cannot be moved later; to place it at once takes one more package, accelerate
        placement = {"device_map": {"": device}} if quantized else {}
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, weights_only=True, output_loading_info=True, **CAREFULLY, **placement
        )
        _check_whole(path, info)
        refuse_not_finite(path, model)
        if (path / ADAPTER).is_dir():
            load_adapter(model, path / ADAPTER)
        return (model if quantized else model.to(device)).eval()


def _check_whole(path: Path, info: dict[str, Any]) -> None:
    """transformers fills in at random what the files lack, with no more than a warning."""
    for kind in ("missing_keys", "mismatched_keys"):
        if keys := sorted(map(str, info.get(kind) or ())):
            raise UserError(
                f"{path} does not hold the whole model: {len(keys)} {kind.replace('_', ' ')}, e.g. {keys[0]}; write "
                "another folder"
            )


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


def _override(settings: RunConfig, argv: Sequence[str]) -> RunConfig:
    """The settings with those of a command line over them.

    Raises:
        ConfigError: One of them is not for `eval` to change.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        save_run_config(settings, file)
        config = parse_run_config([f"--config={file}", *argv], prog="loqt-scale eval")
    old, new = flat_settings(settings), flat_settings(config)
    changed = [key for key in new if new[key] != old[key]]
    for key in changed:
        if key == "data.tokenizer" and same_files(old[key], new[key]):
            continue
        if key == "data.tokenizer" or not key.startswith(_OPEN):
            raise ConfigError(f"{key} is the model's and stays {old[key]!r}; eval takes {', '.join(_OPEN)}")
    return config
