"""How the model of a coordinator is spread over ranks: as it was told, or as is found; and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from loqt_scale.errors import UserError, require_kind
from loqt_scale.layers import LoQTExperts, LoQTLayer, loqt_layers
from loqt_scale.optim import StreamedAdamW, check_no_lbfgs, check_no_muon_of_experts
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


def check_optimizers(layers: Mapping[str, LoQTLayer], optimizers: Sequence[Optimizer]) -> None:
    """Refuses optimizers that take several factors for one thing: LBFGS, torch's Muon of experts. Local."""
    check_no_lbfgs([layer.factor for layer in layers.values()], optimizers)
    experts = {name: layer.factor for name, layer in layers.items() if isinstance(layer, LoQTExperts)}
    check_no_muon_of_experts(experts, optimizers)


class RoundingWatch:
    """Says it if factors of 16 bits are updated as they are.

    Args:
        layers: By name; somebody may cast them later.
        editing: How they are spread over ranks.
        optimizers: What updates them.
    """

    def __init__(self, layers: Mapping[str, LoQTLayer], editing: Editing, optimizers: Sequence[Optimizer]) -> None:
        streamed = all(isinstance(each, StreamedAdamW) for each in optimizers)
        self._layers, self._is_exact, self._told = layers, editing.keeps_masters or streamed, False

    def words(self) -> list[str]:
        """What to say, once; as a rule nothing. Local."""
        short = {layer.factor.dtype for layer in self._layers.values()} & {torch.bfloat16, torch.float16}
        if not short or self._is_exact or self._told:
            return []
        self._told, dtype = True, str(short.pop()).removeprefix("torch.")
        return [
            f"the factors are {dtype} and their optimizer keeps no float32 copies of them: it rounds away every update "
            f"smaller than {'1/256' if dtype == 'bfloat16' else '1/2048'} of a value. Convert a float32 model, and "
            "have the forward pass run in 16 bits: model.float() before convert_to_loqt, then torch.autocast("
            f"device_type, dtype=torch.{dtype}) around it"
        ]
