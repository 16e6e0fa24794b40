"""Every parameter of a run by shape, kind and place: what all counts of bytes start from. Nothing is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from loqt_scale.functional.low_rank_linear import LowRankSpec
from loqt_scale.functional.shares import shard_range
from loqt_scale.layers import loqt_layers
from loqt_scale.model.build import ModelDesign
from loqt_scale.model.structure import decoder_blocks
from loqt_scale.optim import low_rank_parameters
from loqt_scale.strategies import vocabulary_layers

# kind of memory, by how a parameter's name ends
_KINDS = {
    "base.codes": "codes of W",
    "base.scales": "scales of W",
    "projection.codes": "P",
    "projection.scales": "P",
    "factor": "B",
}
REST = "other parameters"
ROOT, EMBEDDING, HEAD = -1, -2, -3  # units that are no block
STATE_KINDS = ("codes of W", "scales of W", "P", "B", REST)


@dataclass(frozen=True)
class ParameterShape:
    """One parameter.

    Args:
        name: Its name in the converted model.
        shape: Whole, not a rank's share.
        dtype: Of the stored values.
        trains: Whether it has a gradient and moments.
        unit: The block that FSDP2 gathers it with, from 0; or `ROOT` (last norm), `EMBEDDING`, `HEAD`.
        of_layer: Whether it is B (or the bias) of a LoQT layer, which may be gathered apart from its block.
        low_rank: Whether it is of the optimizer's group of that name: B, or a linear under `method: full`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trains: bool
    unit: int
    of_layer: bool = False
    low_rank: bool = False

    @property
    def kind(self) -> str:
        """One of `STATE_KINDS`."""
        return next((kind for suffix, kind in _KINDS.items() if self.name.endswith(suffix)), REST)

    @property
    def row_values(self) -> int:
        """Values of one row."""
        return math.prod(self.shape[1:])

    def values(self, ranks: int = 1) -> int:
        """Values of the largest share when dim 0 is cut for so many ranks."""
        start, stop = shard_range(self.shape[0], 0, ranks)
        return (stop - start) * self.row_values

    def nbytes(self, ranks: int = 1) -> int:
        """Bytes of that share."""
        return self.values(ranks) * self.dtype.itemsize

    def gathered_bytes(self, ranks: int, compute: torch.dtype | None) -> int:
        """Bytes of the whole as FSDP2 gathers it: shards padded to equal rows, floats in the compute dtype if given."""
        itemsize = (compute if compute is not None and self.dtype.is_floating_point else self.dtype).itemsize
        return self.values(ranks) * ranks * itemsize


@dataclass(frozen=True)
class ModelShapes:
    """All parameters of a design, each distinct one once, and the LoQT layers' facts."""

    parameters: tuple[ParameterShape, ...]
    layers: tuple[LowRankSpec, ...]


def by_unit(parameters: Iterable[ParameterShape]) -> dict[int, list[ParameterShape]]:
    """Parameters by FSDP2's unit."""
    found: dict[int, list[ParameterShape]] = {}
    for parameter in parameters:
        found.setdefault(parameter.unit, []).append(parameter)
    return found


def model_shapes(design: ModelDesign) -> ModelShapes:
    """Reads the shapes off a design."""
    prefixes = [f"{name}." for name, _ in decoder_blocks(design.model)]
    ends = {
        id(parameter): unit
        for layer, unit in zip(vocabulary_layers(design.model), (EMBEDDING, HEAD), strict=True)
        for parameter in (() if layer is None else layer.parameters())
    }

    def unit(name: str, parameter: Tensor) -> int:
        block = next((index for index, prefix in enumerate(prefixes) if name.startswith(prefix)), ROOT)
        return ends.get(id(parameter), block)

    layers = dict(loqt_layers(design.model))
    low_rank = {id(parameter) for parameter in low_rank_parameters(design.model, design.dense_layers)}
    parameters = tuple(
        ParameterShape(
            name=name,
            shape=tuple(p.shape),
            dtype=p.dtype,
            trains=p.requires_grad,
            unit=unit(name, p),
            of_layer=name.rpartition(".")[0] in layers,
            low_rank=id(p) in low_rank,
        )
        for name, p in design.model.named_parameters()
    )
    return ModelShapes(parameters, tuple(layer.spec for layer in layers.values()))
