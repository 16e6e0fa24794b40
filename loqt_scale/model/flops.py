"""FLOPs of one forward and backward pass of a causal language model, counted from its matrices; nothing is run.

    T tokens, S positions a sequence, O, I, R as in `functional.low_rank_linear`

What is counted are matrix products, two FLOPs a multiply-add: linears, experts (of each token, those that it goes to),
the head, attention's two products over all S x S pairs, as torch's flash kernels, PaLM (arXiv 2204.02311) and
torchtitan count them (the causal half, windows and borders of documents take none away). A trained matrix costs its
product three times, a frozen one twice. LoQT's layers cost what `functional.low_rank_linear` computes: the base twice,
the low-rank products by the path that is taken, no gradient of the base. Not counted: norms, softmax, dequantization,
scans of state-space models, the optimizer, merges.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from loqt_scale.functional.low_rank_linear import LowRankSpec, choose_path
from loqt_scale.layers import LoQTLayer
from loqt_scale.layers.experts import MARKS
from loqt_scale.layers.frozen import FrozenMatrix
from loqt_scale.model.structure import decoder_blocks

_CHOICES = ("num_experts_per_tok", "moe_topk", "top_k_experts")  # architectures' words for the experts of a token
_ATTENDS = ("full_attention", "sliding_attention", "chunked_attention", "attention")  # of a config's layer_types


@dataclass(frozen=True)
class PassFlops:
    """FLOPs of a pass on one rank.

    Args:
        tokens: Of the pass.
        forward: Of the forward pass.
        backward: Of the backward pass, without what is computed once more.
        recomputed: Of the forward passes of blocks that are taken again in the backward pass.
    """

    tokens: int
    forward: int
    backward: int
    recomputed: int

    @property
    def model(self) -> int:
        """What the method asks for: the numerator of MFU."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        """What the device computes: the numerator of HFU."""
        return self.model + self.recomputed


def pass_flops(model: nn.Module, *, sequences: int, seq_len: int, recomputes: bool) -> PassFlops:
    """Counts a pass of a model that is not sharded yet; on the meta device, too.

    Args:
        model: A causal language model of transformers, converted or not.
        sequences: Of one micro-batch.
        seq_len: S.
        recomputes: Whether its blocks are recomputed (`model.activation_checkpointing`).
    """
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    tokens = sequences * seq_len
    blocks = tuple(f"{name}." for name, _ in decoder_blocks(model))
    attention = _attention_flops(config, tokens, seq_len)
    forward, backward, again = attention, 2 * attention, attention
    for name, module in model.named_modules():
        for ahead, back in _products(module, tokens, config):
            forward, backward = forward + ahead, backward + back
            again += ahead if f"{name}.".startswith(blocks) else 0
    return PassFlops(tokens, forward, backward, again if recomputes else 0)


def layer_flops(spec: LowRankSpec, tokens: int) -> tuple[int, int]:
    """(forward, backward) of one LoQT layer without experts, or of one expert.

    Args:
        spec: Its facts.
        tokens: Rows that it is applied to.
    """
    rank, (out, inner) = spec.projection.cols, spec.features
    base, fold, wide, narrow = (2 * n for n in (tokens * out * inner, out * inner * rank, tokens * out, tokens * inner))
    both = (wide + narrow) * rank
    ahead, back = (choose_path(spec, tokens, backward=backward) for backward in (False, True))
    if spec.applied_side == "input":  # X P is made in any case; the gradient of B is (dY^T)(X P)
        forward = narrow * rank + (fold if ahead == "fold" else wide * rank)
        return base + forward, base + wide * rank + (fold if back == "fold" else both)
    forward = fold if ahead == "fold" else both  # dY P is made in any case; the gradient of B is X^T (dY P)
    return base + forward, base + both + (fold if back == "fold" else narrow * rank)


def _products(module: nn.Module, tokens: int, config: Any) -> Iterator[tuple[int, int]]:
    """(forward, backward) of each matrix that a module holds itself."""
    if isinstance(module, LoQTLayer):
        yield _low_rank(module.spec, tokens, config)
    elif not isinstance(module, nn.Embedding | FrozenMatrix):
        experts = all(hasattr(module, mark) for mark in MARKS)  # their biases are matrices, too
        for parameter in module.parameters(recurse=False):
            if parameter.dim() >= (3 if experts else 2):
                count = parameter.shape[0]
                forward = 2 * tokens * parameter.numel() * (_choices(config, count) if experts else count) // count
                yield forward, forward * (2 if parameter.requires_grad else 1)


def _low_rank(spec: LowRankSpec, tokens: int, config: Any) -> tuple[int, int]:
    if spec.experts is None:
        return layer_flops(spec, tokens)
    each = tokens * _choices(config, spec.experts) // spec.experts  # as the layer itself reckons its paths
    forward, backward = layer_flops(spec.each, max(1, each))
    return spec.experts * forward, spec.experts * backward


def _choices(config: Any, experts: int) -> int:
    """Experts of a token; all of them where the config has another word for it."""
    found = (getattr(config, name, None) for name in _CHOICES)
    return next((int(count) for count in found if isinstance(count, int)), experts)


def _number(config: Any, name: str) -> int:
    """A whole number of a config; 0 if it has none of that name."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0


def _attention_flops(config: Any, tokens: int, seq_len: int) -> int:
    """Forward, all layers: queries with keys, and weights with values."""
    heads, hidden, layers = (_number(config, n) for n in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    if not heads:  # no attention: RWKV, Mamba
        return 0
    kinds = getattr(config, "layer_types", None)
    layers = sum(kind in _ATTENDS for kind in kinds) if kinds else layers
    width = _number(config, "head_dim") or hidden // heads
    keys, values = (_number(config, name) or width for name in ("qk_head_dim", "v_head_dim"))
    return 2 * layers * tokens * seq_len * heads * (keys + values)
