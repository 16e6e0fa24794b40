"""The autograd function of a layer of experts: `low_rank_linear` E times, in grouped products.

    E experts, S tokens sorted by expert (one that goes to k experts counts k times), O, I, R as in `low_rank_linear`

The E matrices lie one below the other, packed as one tall matrix: W_q (E O x I), P (E F x R), B (E F_B x R), each
expert with whole row groups. So codes, scales, P and B shard along dim 0 as those of any layer, and one call unpacks
them all.

Every expert is a matrix of its own: it has its own P and B, and a probe collects E gradients or sketches, (E, F, l).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loqt_scale.functional.grouped import grouped_rows, grouped_sums
from loqt_scale.functional.low_rank_linear import LowRankSpec, choose_path, once_differentiable
from loqt_scale.functional.projection import times_test_matrix
from loqt_scale.functional.quantization import unpack


def expert_matrices(codes: Tensor, scales: Tensor | None, spec: LowRankSpec, dtype: torch.dtype) -> Tensor:
    """dequant(W_q) of each expert as it is stored, (E, rows, cols): a fresh tensor."""
    dense = unpack(codes, scales, spec.base, dtype)
    return dense.view(spec.expert_count, -1, spec.base.cols)


def expert_bases(codes: Tensor, scales: Tensor | None, spec: LowRankSpec, dtype: torch.dtype) -> Tensor:
    """P of each expert, (E, F, R): a fresh tensor."""
    dense = unpack(codes, scales, spec.projection, dtype)
    return dense.view(spec.expert_count, -1, spec.projection.cols)


def expert_weights(base: Tensor, bases: Tensor, factors: Tensor, spec: LowRankSpec) -> Tensor:
    """W_eff of each expert in place of `base`, as it is stored; (E, rows, cols), (E, F, R), (E, F_B, R)."""
    left, right = (factors, bases) if spec.side == "input" else (bases, factors)
    return base.baddbmm_(left, right.mT, alpha=spec.scale)


class LowRankExperts(torch.autograd.Function):
    """Inputs: x (S, I), the groups' ends (E,), the packed W and P, B (E F_B, R), and the probe with its Omega."""

    @staticmethod
    def forward(
        ctx: Any,
        x_SI: Tensor,
        ends_E: Tensor,
        base_codes: Tensor,
        base_scales: Tensor | None,
        proj_codes: Tensor,
        proj_scales: Tensor | None,
        factor: Tensor,
        probe: Tensor | None,
        omega: Tensor | None,
        spec: LowRankSpec,
    ) -> Tensor:
        dtype = x_SI.dtype
        weights = expert_matrices(base_codes, base_scales, spec, dtype)
        bases = expert_bases(proj_codes, proj_scales, spec, dtype)
        factors = _by_expert(factor, spec).to(dtype)
        y_SO, xp_SR = _forward(x_SI, weights, bases, factors, ends_E, spec)
        keeps_x = spec.applied_side == "output" or probe is not None
        ctx.save_for_backward(
            x_SI if keeps_x else None, xp_SR, ends_E, base_codes, base_scales, proj_codes, proj_scales, factor, omega
        )
        ctx.spec = spec
        ctx.width = None if probe is None else probe.shape[-1]
        return y_SO

    @staticmethod
    def backward(ctx: Any, dy_SO: Tensor) -> tuple[Tensor | None, ...]:
        x_SI, xp_SR, ends_E, base_codes, base_scales, proj_codes, proj_scales, factor, omega = ctx.saved_tensors
        spec: LowRankSpec = ctx.spec
        dtype = dy_SO.dtype
        needs_x, needs_factor, needs_probe = (ctx.needs_input_grad[i] for i in (0, 6, 7))
        bases = expert_bases(proj_codes, proj_scales, spec, dtype)
        dyp_SR = grouped_rows(dy_SO, bases, ends_E) if spec.applied_side == "output" else None
        d_x = d_factor = d_probe = None
        if needs_factor:
            if xp_SR is not None and needs_x:
                xp_SR = once_differentiable(xp_SR, dy_SO, factor)
            left, right = (dy_SO, xp_SR) if spec.applied_side == "input" else (x_SI, dyp_SR)
            assert left is not None and right is not None
            product = grouped_sums(left, right, ends_E)
            d_factor = (spec.scale * product).reshape(factor.shape).to(factor.dtype)
        if needs_x:
            weights = expert_matrices(base_codes, base_scales, spec, dtype)
            factors = _by_expert(factor, spec).to(dtype)
            d_x = _input_gradient(dy_SO, weights, bases, factors, dyp_SR, ends_E, spec)
        if needs_probe:
            d_probe = _probe_gradient(x_SI, dy_SO, omega, ctx.width, ends_E, spec)
        return d_x, None, None, None, None, None, d_factor, d_probe, None, None


def _by_expert(factor: Tensor, spec: LowRankSpec) -> Tensor:
    return factor.view(spec.expert_count, -1, factor.shape[1])


def _applied(weights: Tensor, spec: LowRankSpec) -> Tensor:
    """(E, O, I) of matrices as they are stored."""
    return weights.mT if spec.transposed else weights


def _path(rows: int, spec: LowRankSpec, *, backward: bool) -> str:
    """As of one expert with its share of the tokens."""
    return choose_path(spec.each, max(1, rows // spec.expert_count), backward=backward)


def _forward(
    x_SI: Tensor, weights: Tensor, bases: Tensor, factors: Tensor, ends_E: Tensor, spec: LowRankSpec
) -> tuple[Tensor, Tensor | None]:
    """(y (S, O), X P or None). `weights` is consumed."""
    xp_SR = grouped_rows(x_SI, bases, ends_E) if spec.applied_side == "input" else None
    if _path(x_SI.shape[0], spec, backward=False) == "fold":
        weights = expert_weights(weights, bases, factors, spec)
        return grouped_rows(x_SI, _applied(weights, spec).mT, ends_E), xp_SR
    y_SO = grouped_rows(x_SI, _applied(weights, spec).mT, ends_E)
    if xp_SR is not None:
        low = grouped_rows(xp_SR, factors.mT, ends_E)
    else:
        low = grouped_rows(grouped_rows(x_SI, factors, ends_E), bases.mT, ends_E)
    return y_SO.add_(low, alpha=spec.scale), xp_SR


def _input_gradient(
    dy_SO: Tensor,
    weights: Tensor,
    bases: Tensor,
    factors: Tensor,
    dyp_SR: Tensor | None,
    ends_E: Tensor,
    spec: LowRankSpec,
) -> Tensor:
    """dX (S, I). `weights` is consumed."""
    if _path(dy_SO.shape[0], spec, backward=True) == "fold":
        return grouped_rows(dy_SO, _applied(expert_weights(weights, bases, factors, spec), spec), ends_E)
    dx_SI = grouped_rows(dy_SO, _applied(weights, spec), ends_E)
    if dyp_SR is None:
        low = grouped_rows(grouped_rows(dy_SO, factors, ends_E), bases.mT, ends_E)
    else:
        low = grouped_rows(dyp_SR, factors.mT, ends_E)
    return dx_SI.add_(low, alpha=spec.scale)


def _probe_gradient(
    x_SI: Tensor, dy_SO: Tensor, omega: Tensor | None, width: int, ends_E: Tensor, spec: LowRankSpec
) -> Tensor:
    """Each stored weight's dense gradient where omega is None, else its sketch (E, F, l), in float32 or wider."""
    wide = torch.promote_types(x_SI.dtype, torch.float32)
    if omega is None:
        left, right = (x_SI, dy_SO) if spec.transposed else (dy_SO, x_SI)
    elif spec.applied_side == "input":
        left, right = x_SI, times_test_matrix(dy_SO, omega, width)
    else:
        left, right = dy_SO, times_test_matrix(x_SI, omega, width)
    return grouped_sums(left, right, ends_E).to(wide)
