"""The weights before quantization, kept until the first merge, which makes up for what quantization has rounded away.

They are the dense model's own tensors, which would be freed at the conversion: kept in host memory from the conversion
to the end of the first merge, so that nobody needs a second copy of the model, or the name of its folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch import Tensor, nn


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Every module's `weight` by the parameter's name. Local."""
    return {name: parameter.data for name, parameter in model.named_parameters() if name.endswith("weight")}


class FirstWeights:
    """Reads them by rows, as merges do.

    Args:
        weights: By parameter's name, e.g. `model.layers.0.mlp.up_proj.weight`.
        layers: Names of the layers that were converted; of others nothing is kept.
    """

    def __init__(self, weights: dict[str, Tensor], layers: Iterable[str]) -> None:
        self._weights = {f"{layer}.weight": weights[f"{layer}.weight"] for layer in layers}
        for name, weight in self._weights.items():
            self._weights[name] = _of_rank_zero(weight)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a weight, float32."""
        return self._weights[name][start:stop].float()


def _of_rank_zero(weight: Tensor) -> Tensor:
    """The weight in host memory. Where only rank 0 has loaded the model (FSDP's loading), its values. Every rank."""
    lone = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true"
    if not lone or PartialState().num_processes == 1:
        return weight.cpu()
    device = PartialState().device
    whole = torch.empty_like(weight, device=device) if weight.is_meta else weight.to(device)
    shared: Tensor = broadcast(whole, from_process=0)
    return shared.cpu()
