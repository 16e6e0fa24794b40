"""Weights before quantization: what may be given as such, by what name each is found, and whether they are the model's.

A source is read by rows, by every rank for itself. One that is made of distributed tensors is gathered first, a matrix
at a time (`of_layer`), since ranks need unequal numbers of rows.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loqt_scale.errors import UserError
from loqt_scale.layers import LoQTLayer
from loqt_scale.layers.names import plain_name
from loqt_scale.merge.placed import InitialWeights

TAKE_BEFORE = "before = model.state_dict(), then convert_to_loqt(model, config), and give initial_weights=before"


class WeightsInMemory:
    """Rows of tensors that are there. They are referred to, not copied.

    Args:
        tensors: By name of the unconverted model; some may be distributed.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def keep(self, names: Iterable[str]) -> None:
        """Lets go of all other tensors."""
        kept = set(names)
        self._tensors = {name: tensor for name, tensor in self._tensors.items() if name in kept}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `InitialWeights.rows`; of plain tensors."""
        return self._tensors[name].detach()[start:stop].to(torch.float32, copy=True)

    def gathered(self, name: str) -> InitialWeights:
        """A source that has this tensor whole, if it is there. Every rank, if it is distributed."""
        if name not in self._tensors:
            return self
        tensor: Any = self._tensors[name].detach()
        return WeightsInMemory({name: tensor.full_tensor()}) if hasattr(tensor, "full_tensor") else self


def of_layer(source: InitialWeights, name: str, layer: LoQTLayer) -> InitialWeights:
    """A source whose rows of one layer may be read by each rank for itself. Every rank.

    Args:
        source: The weights before quantization.
        name: The layer's.
        layer: The layer.
    """
    return source.gathered(layer.weight_name(name)) if isinstance(source, WeightsInMemory) else source


def stored_name(name: str, prefix: str, stored: Container[str]) -> str | None:
    """The name under which a parameter was stored, if it was.

    Args:
        name: In the unconverted model.
        prefix: What the parameters of a model without its head lack, "model" say.
        stored: All names.
    """
    for candidate in (name, f"module.{name}", f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate in stored:
            return candidate
    return None


def as_initial_weights(given: Any, layers: Mapping[str, LoQTLayer], prefix: str = "") -> InitialWeights | None:
    """What `initial_weights` may be, as a source of rows.

    Args:
        given: A source already, an unconverted model, a state dict; None.
        layers: That will ask for their rows, by name.
        prefix: See `stored_name`.

    Raises:
        UserError: Anything else, or a layer's weight is not there, or has another shape, or is of integers.
    """
    if given is None or (hasattr(given, "rows") and not isinstance(given, nn.Module)):
        source: InitialWeights | None = given
        return source
    if isinstance(given, nn.Module):
        given = dict(given.named_parameters(remove_duplicate=False))
    if isinstance(given, Mapping):
        return WeightsInMemory(_chosen(given, layers, prefix))
    raise UserError(
        f"initial_weights is a {type(given).__name__}; give a state dict or an unconverted model (attach: or a folder)"
    )


def _chosen(given: Mapping[str, Any], layers: Mapping[str, LoQTLayer], prefix: str) -> dict[str, Tensor]:
    """The layers' weights out of a state dict, by name of the unconverted model."""
    plain = {plain_name(name): name for name in given} | {name: name for name in given}
    chosen: dict[str, Tensor] = {}
    for layer_name, layer in layers.items():
        name = layer.weight_name(layer_name)
        found = stored_name(name, prefix, plain)
        if found is None:
            raise UserError(f"initial_weights have no {name}; take them before the conversion: {TAKE_BEFORE}")
        tensor = given[plain[found]]
        check_shape(name, tuple(tensor.shape), layer)
        if not tensor.is_floating_point():
            raise UserError(f"initial_weights: {name} is {tensor.dtype}, not floating-point; {TAKE_BEFORE}")
        chosen[name] = tensor
    return chosen


def check_shape(name: str, found: tuple[int, ...], layer: LoQTLayer, where: str = "they hold") -> None:
    """Refuses a weight of another shape.

    Args:
        name: The weight's.
        found: Its shape.
        layer: The layer that was made of it.
        where: Who has it, in words.
    """
    if found != layer.weight_shape():
        raise UserError(
            f"initial_weights: {where} {name} as {found}, but the layer is {layer.weight_shape()}; give those of this "
            "model"
        )
