"""Generated text, of a checkpoint as it was trained (quantized and unmerged) or of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TextStreamer

from loqt_scale.checkpoint import Checkpoint
from loqt_scale.config import Device
from loqt_scale.errors import ConfigError, UserError, explained
from loqt_scale.inference.saved_model import find_saved, open_saved, saved_settings
from loqt_scale.model.hf_folder import CAREFULLY, load_folder
from loqt_scale.process.environment import launched_world_size
from loqt_scale.strategies import create_strategy, resolve_device, single_process


def generate(
    checkpoint: str | Path,
    prompt: str = "",
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 1.0,
    seed: int = 0,
    device: Device = "auto",
) -> str:
    """Prints a continuation as it grows, and returns prompt and continuation. One process.

    Args:
        checkpoint: A checkpoint's folder, a run's for its latest, or a Hugging Face model's.
        prompt: The text to go on from; empty = the start of a document.
        max_new_tokens: Tokens to generate at most.
        temperature: 0 = always the likeliest token.
        top_p: Sample from the likeliest tokens that together have this probability.
        seed: Of the sampling.
        device: auto = cuda if there is one, else cpu.

    Raises:
        ValueError: More tokens than the model has positions; several ranks.
        CheckpointError: The checkpoint is missing or damaged.
    """
    if launched_world_size() > 1:
        raise ConfigError("generate runs in one process; start it without a launcher")
    location, torch_device = Path(checkpoint), resolve_device(device)
    path = find_saved(location)
    if path is None:
        strategy, files = single_process(torch_device), location
        model: Any = load_folder(location, torch_device, "auto")
    else:
        opened = Checkpoint(path)
        config = saved_settings(opened)
        strategy = create_strategy(config, device=torch_device)
        saved = open_saved(opened, config, strategy.comm)
        model, files = saved.load(strategy), saved.files
    with explained(f"the tokenizer in {files} cannot be read"):
        tokenizer: Any = AutoTokenizer.from_pretrained(files, **CAREFULLY)
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [end]
    text_config = model.config.get_text_config()
    _check_tokens(ids, text_config, files, max_new_tokens)
    torch.manual_seed(seed)
    sampling = {"temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    with torch.no_grad(), strategy.step.autocast():
        result = model.generate(
            torch.tensor([ids], device=torch_device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=torch_device),
            do_sample=bool(sampling),
            **sampling,
            max_new_tokens=max_new_tokens,
            use_cache=True,
            eos_token_id=end,
            pad_token_id=end,
            # rows of the embedding that only round its size up
            suppress_tokens=list(range(len(tokenizer), text_config.vocab_size)) or None,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        )
    return str(tokenizer.decode(result[0], skip_special_tokens=True))


def _check_tokens(ids: list[int | None], text_config: Any, files: Path, max_new_tokens: int) -> None:
    """Raises UserError if the model has no embedding or no position for a token."""
    known = [token for token in ids if token is not None]
    if len(known) < len(ids):
        raise UserError(f"the tokenizer in {files} has no end of text to start from; write --prompt TEXT")
    if max(known) >= text_config.vocab_size:
        raise UserError(
            f"the tokenizer in {files} gives the token {max(known)}, but the model knows {text_config.vocab_size}"
        )
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and len(ids) + max_new_tokens > positions:
        raise ConfigError(
            f"the prompt's {len(ids)} tokens and max_new_tokens {max_new_tokens} are more than the model's "
            f"{positions} positions; write a shorter prompt or fewer tokens"
        )
