"""Which tensors of a checkpoint make up which parameter of the original model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from loqt_scale.checkpoint import read_tensors
from loqt_scale.functional.low_rank_linear import LowRankSpec
from loqt_scale.functional.quantization import MatrixLayout, unpack
from loqt_scale.inference.saved_model import SavedModel
from loqt_scale.layers import loqt_layers
from loqt_scale.model.structure import decoder_blocks

_LAYER_PARTS = (".base.codes", ".base.scales", ".projection.codes", ".projection.scales", ".factor")


@dataclass(frozen=True)
class Part:
    """A parameter of the original model.

    Args:
        name: Its name there.
        shape: Its shape.
        spec: The LoQT layer's that it is the weight of; None if it is stored as it is.
        stored: The checkpoint's tensors that make it up, by their role: `value`, or `base.codes`, `factor`, ...
    """

    name: str
    shape: torch.Size
    spec: LowRankSpec | None
    stored: dict[str, str]

    @property
    def layer(self) -> str:
        """The layer that it is the weight of."""
        return self.name.removesuffix(".weight")


class Parts:
    """The parameters of a saved model, in the model's order; tied ones once.

    Args:
        saved: The checkpoint.
    """

    def __init__(self, saved: SavedModel) -> None:
        self._saved = saved
        model = saved.design.model
        self._blocks = [f"{name}." for name, _ in decoder_blocks(model)]
        layers = dict(loqt_layers(model))
        self.all: dict[str, Part] = {}
        for name, parameter in model.named_parameters():
            owner, role = _owner(name)
            if owner not in layers:
                self.all[name] = Part(name, parameter.shape, None, {"value": f"model.{name}"})
                continue
            layer = layers[owner]
            weight = layer.weight_name(owner)
            known = self.all.get(weight)
            stored = {**(known.stored if known else {}), role: f"model.{name}"}
            self.all[weight] = Part(weight, torch.Size(layer.weight_shape()), layer.spec, stored)

    def read(self, names: Iterable[str]) -> Iterator[tuple[Part, dict[str, Tensor]]]:
        """Parameters with their stored tensors by role, one transformer block in memory at a time."""
        for _, group in groupby(names, key=self._block):
            parts = [self.all[name] for name in group]
            stored = [name for part in parts for name in part.stored.values()]
            tensors = read_tensors(self._saved.checkpoint, stored, self._saved.design.model)
            for part in parts:
                yield part, {role: tensors.pop(name) for role, name in part.stored.items()}

    def _block(self, name: str) -> str:
        return next((block for block in self._blocks if name.startswith(block)), name)


def _owner(name: str) -> tuple[str, str]:
    """(LoQT layer, role) of a parameter name; ("", "") if it has not the form of a layer's part."""
    for ending in _LAYER_PARTS:
        if name.endswith(ending):
            return name.removesuffix(ending), ending[1:]
    return "", ""


def dense_matrix(tensors: dict[str, Tensor], which: str, layout: MatrixLayout) -> Tensor:
    """`base` or `projection` of a layer's stored tensors, float32."""
    return unpack(tensors[f"{which}.codes"], tensors.get(f"{which}.scales"), layout, torch.float32)
