"""Causal attention without a mask, for training on packed sequences of full length.

transformers finds out at every forward pass whether a batch holds several sequences a row, by reading a number that is
on the device: the host waits there until the device has done all that came before. It also builds a mask. A training
batch needs neither: it is causal, and no more. An attention implementation that declares no mask (transformers'
`AttentionInterface`) spares both; inside is torch's `scaled_dot_product_attention`, as with `sdpa`, same bits.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

CAUSAL = "causal_sdpa"
# checked one by one (tests/unit/model/test_attention.py): their attention is causal and nothing else, windows apart
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")

AttentionInterface.register(CAUSAL, sdpa_attention_forward)


def attend_causally(model: nn.Module, seq_len: int) -> bool:
    """Spares a model the mask, if it attends with `sdpa`, all that goes before, and nothing else.

    Args:
        model: A causal language model, in place.
        seq_len: Positions of a sequence; a sliding window that holds as many is none.

    Returns:
        Whether it could.
    """
    config: Any = model.config
    window = getattr(config, "sliding_window", None)
    possible = (
        config.model_type in ARCHITECTURES
        and config._attn_implementation == "sdpa"
        and (window is None or window >= seq_len)
    )
    if possible:
        model.set_attn_implementation(CAUSAL)  # type: ignore[operator]
    return possible
