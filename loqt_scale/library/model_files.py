"""What transformers writes of a converted model, and reads again.

Trainer saves by `model.save_pretrained` and goes on from a checkpoint by `model.load_state_dict(strict=False)`, which
takes a missing tensor for a warning. A converted model's own tensors under those calls would be a folder that
`from_pretrained` fills with random linears. So a folder holds the merged weights, under the names of the unconverted
model, and a checkpoint of Trainer's holds beside them the packed tensors, from which a run goes on to the last bit:

    save_model("out")      q_proj.weight
    out/checkpoint-500     q_proj.weight   q_proj.base.codes   q_proj.base.scales   ...   q_proj.factor

`from_pretrained` reads the first and ignores the others, with a warning; Trainer's `load_state_dict` reads the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from loqt_scale.errors import UserError
from loqt_scale.functional.low_rank_linear import effective_weight
from loqt_scale.functional.quantization import unpack
from loqt_scale.layers import LoQTLinear, loqt_layers

PACKED = ("base.codes", "base.scales", "projection.codes", "projection.scales", "factor")
_CHECKPOINT, _LOADED, _MERGED = "_loqt_checkpoint", "_loqt_packed_loaded", "_loqt_merged_loaded"


def write_merged_files(model: nn.Module) -> None:
    """From now on `model.save_pretrained` writes merged weights, and `load_state_dict` reads checkpoints. In place."""
    setattr(model, _CHECKPOINT, None)
    forget_loaded(model)
    if hasattr(type(model), "save_pretrained"):
        object.__setattr__(model, "save_pretrained", MethodType(save_pretrained, model))
    model.register_load_state_dict_pre_hook(_take_packed)


def name_checkpoint(model: nn.Module, folder: str | None) -> None:
    """Says which folder is a checkpoint, from which a run will go on: its last part's name, or None."""
    setattr(model, _CHECKPOINT, folder)


def save_pretrained(model: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    """The model class's own, of merged weights; of a checkpoint also the packed tensors."""
    packed = kwargs.pop("state_dict", None)
    packed = model.state_dict() if packed is None else packed
    state = merged_state(model, packed)
    if os.path.basename(os.path.normpath(save_directory)) == getattr(model, _CHECKPOINT, None):
        state |= {key: value for key, value in packed.items() if key not in state}
    return type(model).save_pretrained(model, save_directory, *args, state_dict=state, **kwargs)


@torch.no_grad()
def merged_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A converted model's state dict under the names of the unconverted model.

    Args:
        model: The model, of which only the layers' shapes count.
        state: Its state, whole tensors; without the layers if another rank has them.
    """
    merged = dict(state)
    for name, layer in loqt_layers(model):
        parts = {part: merged.pop(f"{name}.{part}") for part in PACKED if f"{name}.{part}" in merged}
        if parts:
            merged[f"{name}.weight"] = _weight(layer, parts)
    return merged


def _weight(layer: LoQTLinear, parts: Mapping[str, Tensor]) -> Tensor:
    spec, factor = layer.spec, parts["factor"]
    base = unpack(parts["base.codes"], parts.get("base.scales"), spec.base, torch.float32)
    projection = unpack(parts["projection.codes"], parts.get("projection.scales"), spec.projection, torch.float32)
    return effective_weight(base, projection, factor.float(), spec).to(factor.dtype)


def forget_loaded(model: nn.Module) -> None:
    """Nothing has been loaded yet."""
    setattr(model, _LOADED, set())
    setattr(model, _MERGED, set())


def check_loaded(model: nn.Module) -> None:
    """Refuses to go on with layers of which only merged weights were loaded.

    Raises:
        UserError: There are such.
    """
    lost = sorted(getattr(model, _MERGED, set()) - getattr(model, _LOADED, set()))
    if lost:
        raise UserError(
            f"what was loaded into the converted model holds merged weights of {len(lost)} LoQT layers ({lost[0]}, "
            "say) and not the packed tensors from which a run goes on; to start anew from merged weights, load them "
            "by from_pretrained before the conversion, or resume from a checkpoint-N folder of a run with LoQTCallback"
        )


def _take_packed(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Before `load_state_dict`: takes merged weights out, and notes what there is of each layer."""
    for name, _layer in loqt_layers(model):
        if state_dict.pop(f"{prefix}{name}.weight", None) is not None:
            getattr(model, _MERGED).add(name)
        if _all_in(state_dict, f"{prefix}{name}", ("base.codes", "projection.codes", "factor")):
            getattr(model, _LOADED).add(name)


def _all_in(state: Mapping[str, Tensor], name: str, parts: Iterable[str]) -> bool:
    return all(f"{name}.{part}" in state for part in parts)
