"""Causal attention for training on packed sequences of full length: without a mask, or with one that all layers share.

transformers finds out at every forward pass whether a batch holds several sequences a row, by reading a number that is
on the device: the host waits there until the device has done all that came before. It also builds a mask. A training
batch needs neither: it is causal, and no more. An attention implementation that declares no mask (transformers'
`AttentionInterface`) spares both; inside is torch's `scaled_dot_product_attention`, as with `sdpa`, same bits.

Where documents do not see one another (`documents`), the mask is made once a pass and given to the model. Given as true
and false, each layer would turn it into numbers of its own and keep them for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

CAUSAL, MASKED = "causal_sdpa", "masked_sdpa"
# checked one by one (tests/unit/model/test_attention.py): their attention is causal and nothing else, windows apart
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


def attention_dtype(query_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which `scaled_dot_product_attention` computes."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else query_dtype


def _masked_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **given: Any
) -> Any:
    mask = attention_mask.to(attention_dtype(query.dtype, query.device))  # no copy where it has been made for it
    return sdpa_attention_forward(module, query, key, value, mask, **given)


AttentionInterface.register(CAUSAL, sdpa_attention_forward)
AttentionInterface.register(MASKED, _masked_attention)


def attend_causally(model: nn.Module, seq_len: int) -> bool:
    """Spares a model the mask, if it attends with `sdpa`, all that goes before, and nothing else.

    Args:
        model: A causal language model, in place.
        seq_len: Positions of a sequence; a sliding window that holds as many is none.

    Returns:
        Whether it could.
    """
    return _attend(model, seq_len, CAUSAL)


def attend_by_mask(model: nn.Module, seq_len: int) -> bool:
    """Has such a model attend by a mask that it is given as `attention_mask`: (B, 1, T, T), added to the products.

    Args:
        model: As for `attend_causally`.
        seq_len: Likewise.

    Returns:
        Whether it could; else the model makes masks of its own from `position_ids`.
    """
    return _attend(model, seq_len, MASKED)


def _attend(model: nn.Module, seq_len: int, implementation: str) -> bool:
    config: Any = model.config
    window = getattr(config, "sliding_window", None)
    possible = (
        config.model_type in ARCHITECTURES
        and config._attn_implementation in ("sdpa", CAUSAL, MASKED)
        and (window is None or window >= seq_len)
    )
    if possible:
        model.set_attn_implementation(implementation)  # type: ignore[operator]
    return possible
