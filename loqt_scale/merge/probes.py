"""Probes: what collects each layer's weight gradient in the backward passes before a merge."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from loqt_scale.config import SubspaceConfig
from loqt_scale.functional.low_rank_linear import LowRankSpec
from loqt_scale.functional.projection import sketch_width, test_matrix
from loqt_scale.functional.seeding import stable_seed
from loqt_scale.layers import GradientProbe, LoQTLayer


def probe_shape(spec: LowRankSpec, config: SubspaceConfig) -> tuple[int, ...]:
    """Shape of what a layer's probe collects: a sketch (F, l), or under the exact methods the dense gradient (O, I).

    Of experts one of each: (E, F, l) or (E, O, I).
    """
    experts = () if spec.experts is None else (spec.experts,)
    base, projection = spec.each.base, spec.each.projection
    if config.method != "sketch":
        return (*experts, base.rows, base.cols)
    return (*experts, projection.rows, sketch_width(projection.cols, base.rows, base.cols, config.oversampling))


def attach_probes(layers: Mapping[str, LoQTLayer], config: SubspaceConfig, *, seed: int, device: torch.device) -> None:
    """Gives every layer a probe for its gradient: a sketch of it, or under the exact methods the dense one. Local.

    Layers of one width share a test matrix: a sketch needs its Omega to be independent of its own gradient only.

    Args:
        layers: By name.
        config: How P is found.
        seed: Of the test matrices.
        device: Where the model computes.
    """
    omegas: dict[int, Tensor] = {}
    for layer in layers.values():
        shape, omega = probe_shape(layer.spec, config), None
        if config.method == "sketch":
            each = layer.spec.each.base
            features = each.rows + each.cols - shape[-2]
            if features not in omegas:
                omegas[features] = test_matrix(features, seed=stable_seed(seed, features), device=device)
            omega = omegas[features]
        layer.probe = GradientProbe.collecting(shape, omega, device)
