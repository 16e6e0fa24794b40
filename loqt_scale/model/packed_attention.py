"""Attention inside the documents of packed sequences that computes no product for what is masked.

by document   each document's own causal `scaled_dot_product_attention`, without a mask. The host reads where documents
              begin: for CPUs. Neighbours that are short go together, with a small mask among them.
by blocks     FlexAttention: blocks of 128 x 128 in which nothing is seen are skipped, those in which all is seen have
              no mask. Nobody reads a value of the device, nor is a matrix of T x T made: for CUDA.

T tokens, H query heads, K heads of keys, D values a head
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# Tokens of a group of short documents, at most: forward and backward of 2,048 tokens (H = 8, D = 64, float32) take
# 29, 18, 16, 18, 28 and 47 ms in pieces of 8, 16, 32, 64, 128 and 256 tokens, with masks as without; 214 as one piece.
GROUP = 64
BLOCK = 128  # FlexAttention's own choice
_ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 2e-3}  # of a trial, relative; float32 may be TF32's


def attention_dtype(query_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which `scaled_dot_product_attention` computes."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else query_dtype


# ---- by document -------------------------------------------------------------------------------------------------


def attend_by_document(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    position_ids: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **given: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each document by itself, on a CPU. One operator, which compiled code calls.

    Args:
        module: The attention, as transformers hands it over.
        query: (B, H, T, D).
        key: (B, K, T, D).
        value: Likewise.
        position_ids: (B, T) or (1, T) int64; 0 where a document begins, at the beginning of each sequence too.
        scaling: Of the products; None: 1 / sqrt(D).
        dropout: Of transformers' attention functions, as all that follows.

    Returns:
        (B, T, H, D), and None.

    Raises:
        NotImplementedError: `dropout`, which the operator does not know.
    """
    refuse_dropout(dropout)
    heads, dtype = query.shape[1], attention_dtype(query.dtype, query.device)
    query, key, value = (of.transpose(1, 2) for of in (query, key, value))  # as a model has laid them out
    if key.shape[2] != heads:
        key, value = (of.repeat_interleave(heads // of.shape[2], dim=2) for of in (key, value))
    query, key, value = (of.to(dtype) for of in (query, key, value))
    places = position_ids.expand(query.shape[:2])  # a model that is given none makes one row for all sequences
    attended, _ = _by_document(query, key, value, places, scaling)
    return attended, None


def refuse_dropout(dropout: float) -> None:
    """`DocumentInputs` chooses a mask for models that have it."""
    if dropout:
        raise NotImplementedError("attention dropout needs a mask of all pairs of tokens")


@torch.library.custom_op("loqt_scale::attend_by_document", mutates_args=())
def _by_document(
    query: Tensor, key: Tensor, value: Tensor, position_ids: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Of three (B, T, H, D): the same, and the logarithms of the sums of exponentials, (B, T, H) float32 or float64."""
    found = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *group, 0.0, mask is None, attn_mask=mask, scale=scale
        )
        for group, mask in _pieces(position_ids, query, key, value)
    ]
    attended, sums = (torch.cat([_tokens_first(piece[i]) for piece in found]) for i in (0, 1))
    return attended.view(query.shape), sums.view(query.shape[:3])


@torch.library.custom_op("loqt_scale::attend_by_document_backward", mutates_args=())
def _by_document_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attended: Tensor,
    sums: Tensor,
    position_ids: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    found = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *group, 0.0, mask is None, attn_mask=mask, scale=scale
        )
        for group, mask in _pieces(position_ids, gradient, query, key, value, attended, sums)
    ]
    first, second, third = (torch.cat([_tokens_first(piece[i]) for piece in found]).view(query.shape) for i in range(3))
    return first, second, third


def _pieces(position_ids: Tensor, *tensors: Tensor) -> Iterator[tuple[list[Tensor], Tensor | None]]:
    """Of (B, T, ...) tensors those of each group, as (1, H, tokens, ...), and its mask."""
    groups = grouped(document_lengths(position_ids), tensors[0].dtype)
    lengths = [length for length, _ in groups]
    cut = zip(*(tensor.flatten(0, 1).split(lengths) for tensor in tensors), strict=True)
    for parts, (_, mask) in zip(cut, groups, strict=True):
        yield [part.transpose(0, 1).unsqueeze(0) for part in parts], mask


def _tokens_first(piece: Tensor) -> Tensor:
    return piece.squeeze(0).transpose(0, 1)


@_by_document.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, position_ids: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=exact)


@_by_document_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape), query.new_empty(query.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, position_ids, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output, position_ids)


def _gradients(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_by_document_backward(gradient, *ctx.saved_tensors, ctx.scale), None, None


_by_document.register_autograd(_gradients, setup_context=_keep)


def document_lengths(position_ids: Tensor) -> tuple[int, ...]:
    """Tokens of each document of all sequences, in order; (B, T) int64, which begins with 0."""
    starts = (position_ids.flatten() == 0).nonzero().flatten().tolist()
    return tuple(stop - start for start, stop in pairwise([*starts, position_ids.numel()]))


@lru_cache(maxsize=4)  # all layers of a pass ask for the same
def grouped(lengths: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[int, Tensor | None], ...]:
    """What is attended to at once: a document, or neighbours that have no more than `GROUP` tokens together.

    Returns:
        Tokens of each, and for several documents the mask among them, (1, 1, tokens, tokens), to be added.
    """
    groups: list[list[int]] = []
    for length in lengths:
        if groups and sum(groups[-1]) + length <= GROUP:
            groups[-1].append(length)
        else:
            groups.append([length])
    return tuple((sum(group), _mask_among(group, dtype) if len(group) > 1 else None) for group in groups)


def _mask_among(lengths: list[int], dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # it may be asked for again by a pass that has a backward pass
        seen = torch.block_diag(*(torch.ones(length, length, dtype=torch.bool).tril() for length in lengths))
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)
        return mask[None, None]


# ---- by blocks ---------------------------------------------------------------------------------------------------


def block_mask(starts: Tensor) -> BlockMask:
    """Which blocks of queries see which blocks of keys, by arithmetic on their edges, on the device.

    Args:
        starts: (B, T) int64, of each token the place at which its document begins. Documents are contiguous, so a block
            sees all blocks from its first token's start to itself; whole are those that lie in its last one's document.
    """
    length = starts.shape[1]
    own = torch.arange(-(-length // BLOCK), device=starts.device)  # index of each block of queries
    ends = ((own + 1) * BLOCK).clamp(max=length) - 1
    first = starts[:, ::BLOCK] // BLOCK
    whole = torch.minimum((starts[:, ends] + BLOCK - 1) // BLOCK, own)
    if length % BLOCK:
        whole[:, -1] = len(own) - 1  # what lies behind the sequence's end sees nothing: this block has masks throughout
    seen_partly = torch.where(own < (whole - first)[..., None], first[..., None] + own, own[:, None])
    seen_whole = (whole[..., None] + own).clamp(max=len(own) - 1)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (starts[batch, query] == starts[batch, key])

    numbers = (whole - first + 1, seen_partly, own - whole, seen_whole)
    partly_count, partly, whole_count, wholly = (part.to(torch.int32).unsqueeze(1).contiguous() for part in numbers)
    return BlockMask.from_kv_blocks(
        partly_count, partly, whole_count, wholly, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )


def attend_by_blocks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **given: Any,
) -> tuple[Tensor, None]:
    """FlexAttention of (B, H, T, D) queries and (B, K, T, D) keys and values: (B, T, H, D), and None.

    Raises:
        NotImplementedError: `dropout`, which it does not know.
    """
    refuse_dropout(dropout)
    dtype = attention_dtype(query.dtype, query.device)
    flex: Any = flex_attention
    if query.is_cuda and not torch.compiler.is_compiling():
        flex = _compiled()
    attended = flex(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        block_mask=mask,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return attended.transpose(1, 2).contiguous(), None


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


@lru_cache(maxsize=8)
def why_not_by_blocks(
    query_heads: int, key_heads: int, width: int, length: int, dtype: torch.dtype, device: torch.device
) -> str:
    """Why FlexAttention cannot be used for such a sequence; empty if it can.

    It is tried, forward and backward, on one sequence of three documents, and its numbers are compared with those of
    each document alone: a mask of a long sequence may not fit the device. No random number is drawn.
    """
    each = length // 3 + 1
    starts = (torch.arange(length, device=device) // each * each).unsqueeze(0)
    heads = [_some_values(count, length, width, device) for count in (query_heads, key_heads, key_heads)]
    none = nn.Identity()
    try:
        with torch.enable_grad():
            found = _with_gradients(lambda q, k, v: attend_by_blocks(none, q, k, v, block_mask(starts)), heads, dtype)
            expected = _with_gradients(lambda q, k, v: _one_by_one(q, k, v, each), heads, dtype)
        apart = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]
    except Exception as error:  # a compiler or a kernel that is missing, or does not fit this device
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    good = max(apart) <= _ROUNDING.get(dtype, 2e-3)
    return "" if good else f"its numbers are {max(apart):.1g} apart from those of each document alone"


def _some_values(heads: int, length: int, width: int, device: torch.device) -> Tensor:
    values = torch.arange(heads * length * width, dtype=torch.float32, device=device) * 0.7 + heads
    return values.sin().view(1, length, heads, width).transpose(1, 2)


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, each: int) -> tuple[Tensor, None]:
    """Of documents of `each` tokens, the last of which may be shorter."""
    heads = (of.repeat_interleave(query.shape[1] // of.shape[1], dim=1) for of in (query, key, value))
    documents = zip(*(of.split(each, dim=2) for of in heads), strict=True)
    attended = [nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in documents]
    return torch.cat(attended, dim=2).transpose(1, 2), None


def _with_gradients(
    attention: Callable[..., tuple[Tensor, None]], heads: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    given = [tensor.to(dtype).detach().requires_grad_() for tensor in heads]
    attended, _ = attention(*given)
    return [
        attended.detach().float(),
        *(part.float() for part in torch.autograd.grad(attended.float().square().sum(), given)),
    ]
