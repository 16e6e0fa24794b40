"""What a coordinator is attached to: model, optimizers, and how they are spread over ranks, as told or as found."""

from __future__ import annotations

from typing import Any

from torch import nn

from loqt_scale.errors import UserError, require_kind
from loqt_scale.layers import loqt_layers
from loqt_scale.strategies import Adopted, Editing, adopt, unwrapped, unwrapped_optimizers


def found_or_given(model: nn.Module, optimizer: Any, editing: Editing | None) -> Adopted:
    """Model and optimizers without wrappers, and how they are spread. Every rank.

    Args:
        model: Converted, or what wraps it.
        optimizer: One, or several.
        editing: What counts, if it is given.

    Raises:
        UserError: There is no LoQT layer, or see `strategies.adopt`.
    """
    if editing is not None:
        require_kind(editing, Editing, "editing", "give what loqt_scale.strategies.replicas or alone returns")
    if next(loqt_layers(model), None) is None:
        raise UserError("the model has no LoQT layer; call convert_to_loqt(model, config) first")
    if editing is None:
        _refuse_meta(model)
        return adopt(model, optimizer)
    return Adopted("as given", unwrapped(model), unwrapped_optimizers(optimizer), editing)


def _refuse_meta(model: nn.Module) -> None:
    if any(layer.factor.is_meta for _, layer in loqt_layers(model)):
        raise UserError(
            "the model is on the meta device, so its layers have no values; model.to_empty(device=...) and "
            "model.load_state_dict(...) come first, then the optimizer"
        )
