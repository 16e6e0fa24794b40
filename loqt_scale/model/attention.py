"""Causal attention for training on packed sequences of full length: without a mask, or with one that all layers share.

transformers finds out at every forward pass whether a batch holds several sequences a row, by reading a number that is
on the device: the host waits there until the device has done all that came before. It also builds a mask. A training
batch needs neither: it is causal, and no more. So a pass that ends in the loss gives an empty tensor in the place of a
mask (`no_mask`), which transformers hands on as it is; inside is torch's `scaled_dot_product_attention`, as with
`sdpa`, same bits.

Where documents do not see one another (`documents`), what a layer is given tells how it attends (`packed_attention`):
another empty tensor (`own_document`): document by document; a `BlockMask`: by FlexAttention; a mask of numbers: by
that. Such a mask is made once a pass; given as true and false, each layer would turn it into numbers of its own and
keep them for the backward pass.

Whoever calls the model by themselves (padded batches with their 2-D mask, `generate`) gets transformers' own masks and
what `sdpa` makes of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from loqt_scale.model.packed_attention import attend_by_blocks, attend_by_document, attention_dtype

PACKED = "packed_sdpa"
# checked one by one (tests/unit/model/test_attention.py): their attention is causal and nothing else, windows apart
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


def no_mask(tokens: Tensor) -> Tensor:
    """In place of a mask: each token sees all that goes before it in its sequence. (0, 0, 0, 0) bool."""
    return torch.empty(0, 0, 0, 0, dtype=torch.bool, device=tokens.device)


def own_document(tokens: Tensor) -> Tensor:
    """In place of a mask, on a CPU: each token sees its document, as `position_ids` tell. (1, 0, 0, 0) bool."""
    return torch.empty(1, 0, 0, 0, dtype=torch.bool, device=tokens.device)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Any:
    if isinstance(mask, BlockMask):
        return attend_by_blocks(module, query, key, value, mask, **given)
    if mask is not None and mask.numel() == 0:
        if mask.shape[0]:
            return attend_by_document(module, query, key, value, **given)
        mask = None
    elif mask is not None and mask.dtype != torch.bool:
        mask = mask.to(attention_dtype(query.dtype, query.device))  # no copy where it has been made for it
    return sdpa_attention_forward(module, query, key, value, mask, **given)


AttentionInterface.register(PACKED, _attend)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def attend_packed(model: nn.Module, seq_len: int) -> bool:
    """Has a model take `no_mask`, `own_document` and the like, if it attends with `sdpa`, and all that goes before.

    Args:
        model: A causal language model, in place.
        seq_len: Positions of a sequence; a sliding window that holds as many is none.

    Returns:
        Whether it could; else the model makes masks of its own from `position_ids`.
    """
    config: Any = model.config
    window = getattr(config, "sliding_window", None)
    possible = (
        config.model_type in ARCHITECTURES
        and config._attn_implementation in ("sdpa", PACKED)
        and (window is None or window >= seq_len)
    )
    if possible:
        model.set_attn_implementation(PACKED)  # type: ignore[operator]
    return possible
