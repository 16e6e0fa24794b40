"""A converted model's state under the names of the unconverted model, and `save_pretrained` that writes it.

transformers' `save_pretrained` writes what `state_dict()` holds. Of a converted model these are packed tensors, which
`from_pretrained` does not know: it would fill the linears with random numbers. So a conversion gives each module that
can be saved in this way a `save_pretrained` of its own, which writes merged weights.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loqt_scale.errors import UserError
from loqt_scale.functional.low_rank_experts import expert_bases, expert_matrices, expert_weights
from loqt_scale.functional.low_rank_linear import effective_weight
from loqt_scale.functional.quantization import unpack
from loqt_scale.layers.layer import LoQTLayer
from loqt_scale.layers.names import named_modules, plain_keys

PACKED = ("base.codes", "base.scales", "projection.codes", "projection.scales", "factor")


class SavePretrained:
    """In the place of a module's `save_pretrained`: the same of merged weights. Follows copies and pickles of it.

    Args:
        model: The module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.save_pretrained`.

        Raises:
            UserError: The model's parameters are sharded, and no whole ones were given as `state_dict`; or the class's
                own `save_pretrained` takes none (diffusers').
        """
        state = kwargs.pop("state_dict", None)
        model: Any = self._model
        if "state_dict" not in inspect.signature(type(model).save_pretrained).parameters:
            raise UserError(
                f"the save_pretrained of {type(model).__name__} would write packed weights, which nothing loads; write "
                "loqt_scale.to_dense(model).save_pretrained(folder)"
            )
        merged = merged_state(model, model.state_dict() if state is None else state)
        return type(model).save_pretrained(model, save_directory, *args, state_dict=merged, **kwargs)


def save_merged_weights(model: nn.Module) -> None:
    """Gives every module of a converted model that has a `save_pretrained` and holds LoQT layers our own. In place."""
    for module in model.modules():
        if hasattr(type(module), "save_pretrained") and any(map(_is_layer, module.modules())):
            module.save_pretrained = SavePretrained(module)  # type: ignore[assignment]


@torch.no_grad()
def merged_state(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A converted model's state dict under the names of the unconverted model, in its order.

    Args:
        model: The model, of which only the layers' shapes count.
        state: Its state, of whole tensors; one without the layers (another rank has them) is returned as it is.

    Raises:
        UserError: The tensors are sharded.
    """
    named, turn = named_modules(model, remove_duplicate=False), plain_keys(model)
    layers = {name: module for name, module in named if isinstance(module, LoQTLayer)}
    plain, merged = {turn(key): value for key, value in state.items()}, {}
    for key, value in plain.items():
        name, part = _owner(key)
        if part is None or name not in layers:
            merged[key] = value
        elif (whole := layers[name].weight_name(name)) not in merged:
            parts = {part: plain[f"{name}.{part}"] for part in PACKED if f"{name}.{part}" in plain}
            merged[whole] = merged_weight(layers[name], parts)
    return merged


def merged_weight(layer: LoQTLayer, parts: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """W_eff, computed in float32, from a layer's whole tensors by their names (`PACKED`).

    Args:
        layer: A LoQT layer.
        parts: Its tensors.
        dtype: Of the result; default: that of B.

    Raises:
        UserError: They are not whole.
    """
    spec, factor = layer.spec, parts["factor"]
    if hasattr(factor, "placements") or parts["base.codes"].shape != spec.base.codes_shape:
        raise UserError(
            "this model is sharded, so its save_pretrained cannot merge it; write loqt_scale.save_merged(model, "
            "folder) on every rank, or give save_pretrained a state_dict of whole tensors"
        )
    base = parts["base.codes"], parts.get("base.scales")
    projection = parts["projection.codes"], parts.get("projection.scales")
    if spec.experts is not None:
        stacked = expert_matrices(*base, spec, torch.float32), expert_bases(*projection, spec, torch.float32)
        weight = expert_weights(*stacked, factor.float().view(spec.experts, -1, layer.rank), spec)
    else:
        dense, basis = unpack(*base, spec.base, torch.float32), unpack(*projection, spec.projection, torch.float32)
        weight = effective_weight(dense, basis, factor.float(), spec)
    return weight.to(dtype or factor.dtype)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, LoQTLayer)


def _owner(key: str) -> tuple[str, str | None]:
    """(layer, part) that a name of a state dict stands for; no part if it has not the form of one."""
    for part in PACKED:
        if key.endswith(f".{part}"):
            return key.removesuffix(f".{part}"), part
    return key, None
