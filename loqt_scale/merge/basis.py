"""A layer's new P: found from what its probe has collected, packed as the layer will hold it, and sent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loqt_scale.config import SubspaceConfig
from loqt_scale.functional.low_rank_linear import LowRankSpec
from loqt_scale.functional.projection import (
    VALIDATION_COLUMNS,
    captured_energy,
    kept_of_gradient,
    kept_of_sketch,
    randomized_basis,
    sketch_basis,
    svd_basis,
)
from loqt_scale.functional.quantization import pack
from loqt_scale.functional.seeding import stable_seed
from loqt_scale.layers import LoQTLayer

BLANK = -1.0
EXPERTS_VALUES = 2**22  # of sketches of one layer's experts that are factorised in one batch
# P (F, r) float32, the share of the gradient's energy in it, and `FoundBasis.kept`
Kept = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class FoundBasis:
    """A new P, packed as its layer will hold it, and what of the gradient's energy it keeps.

    `energy` is the share that P keeps of it, `kept` random combinations of what P keeps, (r, 8) (`kept_of_sketch`). Of
    experts they are those of all: P one below the other, energies (E,), kept (E, r, 8).

    An energy of `BLANK` says that the gradient is zero: the layer was in no backward pass of any rank (an expert
    without tokens, a dropped layer, an unused head), and its P is a random one.
    """

    codes: Tensor
    scales: Tensor | None
    energy: Tensor
    kept: Tensor

    @property
    def is_blank(self) -> Tensor:
        """Whether P stands for no gradient; a bool, where the tensors are."""
        return self.energy == BLANK

    def to_bytes(self) -> Tensor:
        """All of it as one row of bytes, to be sent."""
        tensors = (self.energy.float(), self.kept.float(), self.codes, self.scales)
        return torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors if tensor is not None])

    @staticmethod
    def count_bytes(spec: LowRankSpec) -> int:
        """Length of that row, of a layer of `spec`."""
        layout = spec.projection
        return 4 * spec.expert_count * (1 + layout.cols * VALIDATION_COLUMNS) + layout.groups * (
            layout.codes_shape[1] + (layout.scales_shape or (0, 0))[1]
        )

    @classmethod
    def from_bytes(cls, row: Tensor, spec: LowRankSpec) -> FoundBasis:
        """What was sent. Copies: inside the row, scales need not lie where float32 may."""
        layout, experts = spec.projection, spec.expert_count
        kept_shape = (experts, layout.cols, VALIDATION_COLUMNS)
        start = 4 * experts + 4 * math.prod(kept_shape)
        end = start + layout.codes_shape[0] * layout.codes_shape[1]
        energies, kept = row[:start].view(torch.float32).split([experts, math.prod(kept_shape)])
        scales = None if layout.scales_shape is None else row[end:].view(layout.scales_shape).clone()
        codes = row[start:end].view(layout.codes_shape).clone()
        if spec.experts is None:
            return cls(codes, scales, energies[0], kept.view(kept_shape)[0])
        return cls(codes, scales, energies, kept.view(kept_shape))


def find_bases(
    layers: Mapping[str, LoQTLayer], collected: Mapping[str, Tensor], config: SubspaceConfig, *, seed: int
) -> dict[str, FoundBasis]:
    """The new P of several layers. Layers whose sketches have one shape and rank share a batched call. Local.

    A gradient may hold NaN or infinity. The trainer will then skip the step and drop its P, but it learns that only
    later, and LAPACK must not fail meanwhile: such values are replaced by zeros. If the step were merged all the same,
    the layer's energy, NaN, would show it.

    Args:
        layers: All layers by name.
        collected: Gradients or sketches of some of them, float32; they are overwritten.
        config: How P is found.
        seed: Of the run and step, for the background (see `functional.projection`) and for `randomized`.
    """
    alike: dict[tuple[int, ...], list[str]] = {}
    found: dict[str, FoundBasis] = {}
    for name, gradient in collected.items():
        if layers[name].spec.experts is not None:
            found[name] = _find_experts(layers[name], gradient, config, name, seed)
            continue
        alike.setdefault((*gradient.shape, layers[name].rank), []).append(name)
    for names in alike.values():
        finite = [collected[name].isfinite().all() for name in names]
        blank = [~collected[name].any() for name in names]
        gradients = [collected[name].nan_to_num_(0.0, 0.0, 0.0) for name in names]
        if config.method == "sketch":
            bases = _from_sketches(gradients, layers[names[0]].rank, seed)
        else:
            bases = [
                _from_dense(layers[name], gradient, config, stable_seed("randomized", seed, name))
                for name, gradient in zip(names, gradients, strict=True)
            ]
        for name, (basis, energy, kept), good, empty in zip(names, bases, finite, blank, strict=True):
            energy = torch.where(empty, BLANK, torch.where(good, energy, float("nan")))
            found[name] = FoundBasis(*pack(basis, layers[name].spec.projection), energy, kept)
    return found


def _find_experts(layer: LoQTLayer, gradients: Tensor, config: SubspaceConfig, name: str, seed: int) -> FoundBasis:
    """The new P of each expert of a layer, from (E, F, l) or (E, O, I). Local."""
    blank, good = ~gradients.flatten(1).any(1), gradients.flatten(1).isfinite().all(1)
    gradients.nan_to_num_(0.0, 0.0, 0.0)
    if config.method == "sketch":
        parts = gradients.split(max(1, EXPERTS_VALUES // gradients[0].numel()))
        found = [each for part in parts for each in _from_sketches(list(part), layer.rank, seed)]
    else:
        seeds = [stable_seed("randomized", seed, f"{name}[{expert}]") for expert in range(len(gradients))]
        found = [_from_dense(layer, part, config, own) for part, own in zip(gradients, seeds, strict=True)]
    bases, energies, kept = zip(*found, strict=True)
    energy = torch.where(blank, BLANK, torch.where(good, torch.stack(energies), float("nan")))
    return FoundBasis(*pack(torch.cat(bases), layer.spec.projection), energy, torch.stack(kept))


def _from_sketches(sketches: list[Tensor], rank: int, seed: int) -> list[Kept]:
    """Of sketches of one shape."""
    stacked = sketches[0].unsqueeze(0) if len(sketches) == 1 else torch.stack(sketches)
    bases = sketch_basis(stacked, rank, seed=seed)
    kept = kept_of_sketch(stacked, bases)
    return list(zip(bases, kept.square().sum((-2, -1)), kept, strict=True))


def _from_dense(layer: LoQTLayer, gradient: Tensor, config: SubspaceConfig, seed: int) -> Kept:
    """By the methods that need the whole gradient."""
    if config.method == "svd":
        basis = svd_basis(gradient, layer.rank, layer.side, seed=seed)
    else:
        basis = randomized_basis(
            gradient,
            layer.rank,
            layer.side,
            oversampling=config.oversampling,
            power_iterations=config.power_iterations,
            seed=seed,
        )
    energy = captured_energy(gradient, basis, layer.side)
    return basis, energy, kept_of_gradient(gradient, basis, layer.side)
