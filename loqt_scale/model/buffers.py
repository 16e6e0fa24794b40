"""The values of a model's buffers (rotary frequencies and the like), which the meta device cannot hold.

Buffers are small, so every rank computes them all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from loqt_scale.errors import UserError
from loqt_scale.functional.seeding import isolated_rng
from loqt_scale.model.structure import skeleton


def init_buffers(model: nn.Module, device: torch.device | str) -> None:
    """Give every buffer of a model built on meta its true value, on `device`; parameters are not touched.

    A module's own `_init_weights` fills its buffers where it can (rotary frequencies, embedding scales). For the rest
    the model's constructor is run once more with all parameters on meta, so that only the buffers take memory. All
    buffers are computed, also those not on meta: after `to_empty` a buffer has storage and still no value.

    Args:
        model: A `PreTrainedModel`, or a model that contains some; its layers may be converted or sharded already.
        device: Where the buffers go.

    Raises:
        ValueError: Nothing computes one of the buffers.
    """
    rebuilt: dict[str, torch.Tensor] = {}
    for name, path in _module_paths([model]):
        own = {leaf: buffer for leaf, buffer in path[-1]._buffers.items() if buffer is not None}
        covered = _own_buffers(path) if own else {}
        for leaf in own:
            value = covered.get(leaf)
            if value is None:
                full_name = re.sub(r"(_checkpoint_wrapped_module|_orig_mod)\.", "", f"{name}.{leaf}".lstrip("."))
                rebuilt = rebuilt or _rebuilt_buffers(model)
                if full_name not in rebuilt:
                    raise UserError(
                        f"nothing computes the buffer {full_name} (of a {type(path[-1]).__name__}) of a model built on "
                        "meta; cover it in the model's _init_weights"
                    )
                value = rebuilt[full_name]
            path[-1]._buffers[leaf] = value.to(device)


def _module_paths(path: list[nn.Module], name: str = "") -> Iterator[tuple[str, list[nn.Module]]]:
    """Every module's name with the modules from the root to it."""
    yield name, path
    for leaf, child in path[-1].named_children():
        yield from _module_paths([*path, child], f"{name}.{leaf}".lstrip("."))


def _own_buffers(path: list[nn.Module]) -> dict[str, torch.Tensor]:
    """The buffers of the last module of a path that its nearest model's `_init_weights` writes.

    It runs twice over different fillings; a buffer that comes out the same was written. (NaN would do for floats only.)
    """
    nearest = next((m for m in reversed(path) if isinstance(m, PreTrainedModel)), None)
    if nearest is None:
        return {}
    results = []
    for fill in (0, 1):
        stand_in = skeleton(path[-1])
        for leaf, buffer in path[-1]._buffers.items():
            if buffer is not None:
                stand_in._buffers[leaf] = torch.full(buffer.shape, fill, dtype=buffer.dtype)
        with isolated_rng():
            nearest._init_weights(stand_in)
        results.append(stand_in._buffers)
    zeros, ones = results
    return {leaf: b for leaf, b in zeros.items() if b is not None and torch.equal(b, cast(torch.Tensor, ones[leaf]))}


def _rebuilt_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """All buffers of a second instance of the model, whose parameters go to meta as soon as they are registered."""
    if not isinstance(model, PreTrainedModel):
        return {}
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, None if param is None else nn.Parameter(param.to("meta"), requires_grad=False))

    module_class: Any = nn.Module
    module_class.register_parameter = register_on_meta
    try:
        with isolated_rng(), torch.device("cpu"):
            return dict(type(model)(model.config).named_buffers(remove_duplicate=False))
    finally:
        module_class.register_parameter = register
