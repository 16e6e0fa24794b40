"""What updates the factors: which optimizers merges can work with, and what is said of their rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.optim import Optimizer

from loqt_scale.layers import LoQTExperts, LoQTLayer
from loqt_scale.optim import StreamedAdamW, check_no_lbfgs, check_no_muon_of_experts, parameters_of
from loqt_scale.strategies import Editing


def check_optimizers(layers: Mapping[str, LoQTLayer], optimizers: Sequence[Optimizer]) -> None:
    """Refuses optimizers that take several factors for one thing: LBFGS, torch's Muon of experts. Local."""
    check_no_lbfgs([layer.factor for layer in layers.values()], optimizers)
    experts = {name: layer.factor for name, layer in layers.items() if isinstance(layer, LoQTExperts)}
    check_no_muon_of_experts(experts, optimizers)


def optimizer_of(layer: LoQTLayer, optimizers: Sequence[Optimizer]) -> Optimizer:
    """That which updates a layer's factor. Local."""
    if len(optimizers) == 1:  # which may be an engine's, over parameters of its own
        return optimizers[0]
    return next(each for each in optimizers if any(p is layer.factor for p in parameters_of(each)))


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
