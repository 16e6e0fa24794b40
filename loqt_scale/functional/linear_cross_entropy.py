"""Cross-entropy of logits that a linear head makes, without ever holding the logits of all tokens.

    z = post(h W^T + b)        loss = sum over counted tokens of logsumexp(z) - z[label]

    N tokens, H hidden size, V vocabulary

Tokens are taken in chunks. A chunk's gradient, softmax(z) minus the one-hot label, is at hand as soon as its loss is:
the forward pass makes dh and dW there and then (as Liger's fused kernel does, arXiv 2410.10989), no logit is computed
twice, and the backward pass multiplies by the loss's own gradient. What is kept is (N, H) and (V, H), never (N, V).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_VALUES = 2**26  # logits of a chunk: 256 MiB in float32


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits after the head: z = cap tanh(scale x / cap), or scale x.

    Args:
        scale: A factor.
        cap: Bound of the logits (Gemma's soft cap); None: none.
    """

    scale: float = 1.0
    cap: float | None = None

    def apply_(self, logits: Tensor) -> Tensor:
        """In place, on float32 or float64."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def backward_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Turns a gradient by z into one by x, in place; `logits` is z, and is overwritten."""
        if self.cap is not None:
            gradient.mul_(logits.div_(self.cap).square_().neg_().add_(1.0))
        return gradient.mul_(self.scale) if self.scale != 1.0 else gradient


NO_TRANSFORM = LogitTransform()


def chunk_tokens(vocab_size: int) -> int:
    """Tokens whose logits fill a chunk; at least 16."""
    return max(16, CHUNK_VALUES // vocab_size)


def linear_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    *,
    chunk: int,
    ignored: int,
    transform: LogitTransform = NO_TRANSFORM,
) -> Tensor:
    """Sum of the cross-entropies of all counted tokens; gradients to hidden states, weight and bias.

    Products are in autocast's dtype if it is on, else in the hidden states'; softmax, losses and the sum of the
    weight's gradient over chunks are in float32 (float64 for float64 input).

    Args:
        hidden_NH: (N, H).
        weight_VH: (V, H).
        bias_V: (V,), or None.
        labels_N: (N,) int64.
        chunk: Tokens of a chunk, 1 or more.
        ignored: The label of tokens that do not count.
        transform: What is done to the logits before the loss.

    Returns:
        () float32 (float64), in nats.
    """
    device_type = hidden_NH.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else hidden_NH.dtype
    how = _How(chunk, ignored, transform, dtype, torch.is_grad_enabled())
    with torch.autocast(device_type, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(hidden_NH, weight_VH, bias_V, labels_N, how)
    return loss


@dataclass(frozen=True)
class _How:
    chunk: int
    ignored: int
    transform: LogitTransform
    dtype: torch.dtype
    learns: bool  # inside the function gradients are off in any case


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, how: _How) -> Tensor:
        wanted = [how.learns and needed for needed in ctx.needs_input_grad[:3]]
        x, w = hidden.to(how.dtype), weight.to(how.dtype)
        exact = torch.float64 if how.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=exact, device=x.device)
        by_hidden = torch.empty_like(hidden) if wanted[0] else None
        by_weight = torch.zeros(weight.shape, dtype=exact, device=x.device) if wanted[1] else None
        by_bias = torch.zeros(weight.shape[0], dtype=exact, device=x.device) if wanted[2] else None
        for first in range(0, x.shape[0], how.chunk):
            rows = slice(first, first + how.chunk)
            logits = F.linear(x[rows], w, None if bias is None else bias.to(how.dtype)).to(exact)
            loss, gradient = _chunk(how.transform.apply_(logits), labels[rows], how, any(wanted))
            total += loss
            if gradient is None:
                continue
            if by_bias is not None:
                by_bias += gradient.sum(0)
            gradient = gradient.to(how.dtype)
            if by_hidden is not None:
                by_hidden[rows] = gradient @ w
            if by_weight is not None:
                by_weight += gradient.T @ x[rows]
        ctx.gradients = [
            None if gradient is None or input is None else gradient.to(input.dtype)
            for gradient, input in zip((by_hidden, by_weight, by_bias), (hidden, weight, bias), strict=True)
        ]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *by_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "a loss by chunks takes one backward pass; compute it again, or set model.loss_chunk_tokens 0"
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if gradient is None else gradient.mul_(by_loss[0]) for gradient in gradients]
        return (*scaled, None, None)


def _chunk(logits: Tensor, labels: Tensor, how: _How, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of a chunk's losses, and its gradient by the logits before their transform. Overwrites the logits."""
    counted = labels != how.ignored
    index = labels.where(counted, 0).unsqueeze(1)
    normalizer = torch.logsumexp(logits, 1, keepdim=True)
    loss = (normalizer - logits.gather(1, index)).squeeze(1).where(counted, 0.0).sum()
    if not wanted:
        return loss, None
    capped = how.transform.cap is not None  # then the logits are needed once more
    gradient = (logits - normalizer if capped else logits.sub_(normalizer)).exp_()
    gradient.scatter_add_(1, index, torch.full_like(normalizer, -1.0))
    return loss, how.transform.backward_(gradient, logits).masked_fill_(~counted.unsqueeze(1), 0.0)
