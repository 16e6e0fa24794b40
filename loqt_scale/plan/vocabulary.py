"""The vocabulary of a run that may not have its tokenizer at hand yet."""

from __future__ import annotations

from loqt_scale.config import DataConfig, ModelConfig
from loqt_scale.data.tokenizers import load_tokenizer

ASSUMED = 32128  # T5's and, rounded up, LLaMA's


def vocabulary_size(data: DataConfig, model: ModelConfig, given: int | None) -> tuple[int, str]:
    """(rows of the embedding, a note for people if that is an assumption).

    Args:
        data: Its tokenizer.
        model: Whether it is a model by a name of ours, whose vocabulary follows the tokenizer's.
        given: What the user said, if anything.
    """
    if given is not None:
        return given, ""
    tokenizer = data.tokenizer
    if tokenizer == "bpe":
        return data.bpe_vocab_size, ""
    try:
        loaded = load_tokenizer(tokenizer)
        return loaded.vocab_size if model.path is None else loaded.token_count, ""
    except (OSError, ValueError):
        return (
            ASSUMED,
            f"(tokenizer {tokenizer} could not be read: a vocabulary of {ASSUMED} is assumed; --vocab_size N)",
        )
