"""What transformers' Trainer writes of a converted model, and reads again.

Trainer saves by `model.save_pretrained`, and goes on from a checkpoint by `model.load_state_dict(strict=False)`, which
takes a missing tensor for a warning. A folder of a converted model holds merged weights (`layers.saving`). A checkpoint
of Trainer's needs the packed tensors too, from which a run goes on to the last bit:

    save_model("out")      q_proj.weight
    out/checkpoint-500     q_proj.weight   q_proj.base.codes   q_proj.base.scales   ...   q_proj.factor

`from_pretrained` reads the first and ignores the others, with a warning; Trainer's `load_state_dict` reads the others.

A Trainer without the callback would take merged weights and factors' moments for its own, which have other shapes:
torch's fused Adam writes past their ends. The file of the optimizer therefore holds a name that torch refuses to load
unless somebody has allowed it (`ResumeWithLoQTCallback`).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loqt_scale.errors import UserError
from loqt_scale.layers import loqt_layers
from loqt_scale.layers.names import plain_name
from loqt_scale.layers.saving import SavePretrained, merged_state

_CHECKPOINT, _LOADED, _MERGED = "_loqt_checkpoint", "_loqt_packed_loaded", "_loqt_merged_loaded"
_NEEDED = ("base.codes", "projection.codes", "factor")


class ResumeWithLoQTCallback:
    """Stands in a checkpoint's optimizer.pt. Its name is the message of torch.load where no callback has allowed it."""


class SaveCheckpoint(SavePretrained):
    """`SavePretrained` that adds the packed tensors where the folder is a checkpoint (`name_checkpoint`)."""

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """As `SavePretrained.__call__`."""
        model: Any = self._model
        if os.path.basename(os.path.normpath(save_directory)) != getattr(model, _CHECKPOINT, None):
            return super().__call__(save_directory, *args, **kwargs)
        state = kwargs.pop("state_dict", None)
        packed = model.state_dict() if state is None else state
        return type(model).save_pretrained(
            model, save_directory, *args, state_dict={**merged_state(model, packed), **packed}, **kwargs
        )


def write_checkpoints(model: nn.Module) -> None:
    """From now on checkpoints that are saved hold packed tensors, and `load_state_dict` reads them. In place."""
    if getattr(model, _CHECKPOINT, "none yet") != "none yet":
        return
    name_checkpoint(model, "")
    forget_loaded(model)
    torch.serialization.add_safe_globals([ResumeWithLoQTCallback])
    if hasattr(type(model), "save_pretrained"):
        model.save_pretrained = SaveCheckpoint(model)  # type: ignore[assignment]
    model.register_load_state_dict_pre_hook(_take_packed)


def mark_optimizer_file(optimizer: Optimizer) -> None:
    """From now on its state dict is loaded from a file only where `write_checkpoints` was called. In place."""
    optimizer.register_state_dict_post_hook(_mark)


def _mark(_: Optimizer, state_dict: dict[str, Any]) -> None:
    state_dict["loqt_scale"] = ResumeWithLoQTCallback


def name_checkpoint(model: nn.Module, folder: str) -> None:
    """Says which folder is a checkpoint, from which a run will go on: the last part of its name; "": none."""
    setattr(model, _CHECKPOINT, folder)


def forget_loaded(model: nn.Module) -> None:
    """Nothing has been loaded yet."""
    setattr(model, _LOADED, set())
    setattr(model, _MERGED, set())


def check_loaded(model: nn.Module) -> None:
    """Refuses to go on with layers of which only merged weights were loaded.

    Raises:
        UserError: There are such.
    """
    loaded: set[str] = getattr(model, _LOADED, set())
    merged: set[str] = getattr(model, _MERGED, set())
    lost = sorted(name for name in merged if any(f"{name}.{part}" not in loaded for part in _NEEDED))
    if lost:
        raise UserError(
            f"what was loaded into the converted model holds merged weights of {len(lost)} LoQT layers ({lost[0]}, "
            "say) and not the packed tensors from which a run goes on; to start anew from merged weights, load them "
            "by from_pretrained before the conversion, or resume from a checkpoint-N folder of a run with LoQTCallback"
        )


def _take_packed(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Before `load_state_dict`: takes merged weights out, and notes what there is of each layer."""
    plain = {plain_name(key) for key in state_dict}
    for name, layer in loqt_layers(model):
        if state_dict.pop(prefix + layer.weight_name(name), None) is not None:
            getattr(model, _MERGED).add(name)
        parts = [f"{name}.{part}" for part in _NEEDED]  # which may come from several files of one checkpoint
        getattr(model, _LOADED).update(part for part in parts if prefix + part in plain)
