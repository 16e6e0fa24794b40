"""Causal attention for training on packed sequences of full length: without a mask, or with one that all layers share.

transformers finds out at every forward pass whether a batch holds several sequences a row, by reading a number that is
on the device: the host waits there until the device has done all that came before. It also builds a mask. A training
batch needs neither: it is causal, and no more. An attention implementation that declares no mask (transformers'
`AttentionInterface`) spares both; inside is torch's `scaled_dot_product_attention`, as with `sdpa`, same bits.

Where documents do not see one another (`documents`), what a layer is given tells how it attends (`packed_attention`):
nothing but positions, on a CPU: document by document; a `BlockMask`: by FlexAttention; a mask of numbers: by that. Such
a mask is made once a pass; given as true and false, each layer would turn it into numbers of its own and keep them for
the backward pass.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from loqt_scale.model.packed_attention import attend_by_blocks, attend_by_document, attention_dtype

CAUSAL, APART = "causal_sdpa", "documents_apart"
# checked one by one (tests/unit/model/test_attention.py): their attention is causal and nothing else, windows apart
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


def _attend_apart(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Any:
    if mask is None:
        whole = query.shape[2] == key.shape[2]  # nothing comes from a cache
        if query.device.type == "cpu" and whole and not given.get("dropout"):
            return attend_by_document(module, query, key, value, **given)
        return sdpa_attention_forward(module, query, key, value, None, **given)  # the model is called by itself
    if isinstance(mask, BlockMask):
        return attend_by_blocks(module, query, key, value, mask, **given)
    numbers = mask.to(attention_dtype(query.dtype, query.device))  # no copy where it has been made for it
    return sdpa_attention_forward(module, query, key, value, numbers, **given)


AttentionInterface.register(CAUSAL, sdpa_attention_forward)
AttentionInterface.register(APART, _attend_apart)


def attend_causally(model: nn.Module, seq_len: int) -> bool:
    """Spares a model the mask, if it attends with `sdpa`, all that goes before, and nothing else.

    Args:
        model: A causal language model, in place.
        seq_len: Positions of a sequence; a sliding window that holds as many is none.

    Returns:
        Whether it could.
    """
    return _attend(model, seq_len, CAUSAL)


def attend_apart(model: nn.Module, seq_len: int) -> bool:
    """Has such a model attend inside of documents, by what it is given as `attention_mask` and `position_ids`.

    Args:
        model: As for `attend_causally`.
        seq_len: Likewise.

    Returns:
        Whether it could; else the model makes masks of its own from `position_ids`.
    """
    return _attend(model, seq_len, APART)


def _attend(model: nn.Module, seq_len: int, implementation: str) -> bool:
    config: Any = model.config
    window = getattr(config, "sliding_window", None)
    possible = (
        config.model_type in ARCHITECTURES
        and config._attn_implementation in ("sdpa", CAUSAL, APART)
        and (window is None or window >= seq_len)
    )
    if possible:
        model.set_attn_implementation(implementation)  # type: ignore[operator]
    return possible
