"""FLOPs of an operator as torch counts them, with those that torch's own table lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import loqt_scale.functional.grouped  # noqa: F401  (importing it registers torch.ops.loqt_scale)

aten = torch.ops.aten


def _product_in_place(target: Any, left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    """addmm_ and baddbmm_ of shapes (..., n, k) and (..., k, m)."""
    batch = left[0] if len(left) == 3 else 1
    return int(2 * batch * left[-2] * left[-1] * right[-1])


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


FORMULAS: Mapping[Any, Callable[..., int]] = {
    aten.addmm_: _product_in_place,
    aten.baddbmm_: _product_in_place,
    torch.ops.loqt_scale.grouped_rows: lambda x, w, ends, *_, **__: 2 * x[0] * w[1] * w[2],
    torch.ops.loqt_scale.grouped_sums: lambda a, b, ends, *_, **__: 2 * a[0] * a[1] * b[1],
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""What torch's table lacks, as `FlopCounterMode(custom_mapping=...)` takes it."""


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, torch.Tensor) else value


def operator_flops(packet: Any, args: Any, kwargs: Any, result: Any) -> int:
    """FLOPs of one call of an operator; 0 of what is no product and no attention.

    Attention is counted whole, causal or not, as `FlopCounterMode` does.

    Args:
        packet: E.g. `torch.ops.aten.mm`.
        args: Its arguments.
        kwargs: Likewise.
        result: What it returned.
    """
    if packet in FORMULAS:
        return FORMULAS[packet](*(_shape(value) for value in args))
    return int(flop_registry[packet](*args, **kwargs, out_val=result)) if packet in flop_registry else 0
