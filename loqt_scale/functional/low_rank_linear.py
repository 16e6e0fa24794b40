"""The layer's one autograd function: y = x W_eff^T + bias with W_eff = dequant(W_q) + s L(B).

    T tokens (all leading dims of x), O out_features, I in_features, R rank
    side input   L(B) = B P^T   P (I, R)  B (O, R)     dB = s dY^T (X P)     -> X P is saved, X is not
    side output  L(B) = P B^T   P (O, R)  B (I, R)     dB = s X^T (dY P)     -> X is saved

The weight gradient dY^T X is never formed, which is where LoQT's compute saving lies: 4 T O I FLOPs instead of 6 T O I.

*Fold or branch.* The low-rank term can be written into the freshly dequantized weight (fold: one GEMM of 2 O I R
FLOPs) or applied beside it (branch: 2 T R (O + I)). `choose_path` counts both, forward and backward apart.

*Probes.* A merge needs the weight gradient's sketch, or the dense gradient for the exact methods. Both are gradients of
factors that are added to y with value zero: y += x Z Omega^T has dZ = X^T (dY Omega), the sketch itself. So a probe
is one more differentiable input (its values are never read), autograd accumulates it over micro-batches in `.grad`, and
the function stays free of side effects: activation checkpointing, torch.compile and double use of a layer all work.

*Transposed.* A weight that is stored (I, O), M = W^T, keeps that form in `base`, so that merges, checkpoints and
exports see the matrix that the model's files have. P on M's one side is P on W's other side, with the same P and B:
here only `unpack` and the dense probe transpose, and `applied_side` is looked at in place of `side`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loqt_scale.config import LowRankCompute, LowRankPath, Side, SideChoice
from loqt_scale.errors import UserError
from loqt_scale.functional.projection import times_test_matrix
from loqt_scale.functional.quantization import MatrixLayout, unpack

OTHER_SIDE: dict[Side, Side] = {"input": "output", "output": "input"}


@dataclass(frozen=True)
class LowRankSpec:
    """The static facts of a layer.

    Args:
        base: Layout of the weight as it is stored: W (O x I), or its transpose.
        projection: Layout of P (F x R).
        side: Which side of the stored weight P stands on.
        scale: s.
        compute: `fold`, `branch` or `auto`.
        transposed: Whether the stored weight is W^T.
        experts: None, or how many matrices lie one below the other (see `low_rank_experts`); layouts are of all.
    """

    base: MatrixLayout
    projection: MatrixLayout
    side: Side
    scale: float
    compute: LowRankCompute = "auto"
    transposed: bool = False
    experts: int | None = None

    @property
    def expert_count(self) -> int:
        """Matrices: the experts, or 1."""
        return 1 if self.experts is None else self.experts

    @property
    def each(self) -> LowRankSpec:
        """The spec of one of the experts; itself if there are none."""
        if self.experts is None:
            return self
        base, projection = (
            replace(layout, rows=layout.rows // self.experts) for layout in (self.base, self.projection)
        )
        return replace(self, base=base, projection=projection, experts=None)

    @property
    def applied_side(self) -> Side:
        """Which side of W P stands on."""
        return OTHER_SIDE[self.side] if self.transposed else self.side

    @property
    def features(self) -> tuple[int, int]:
        """(O, I): out_features and in_features, whichever way the weight is stored."""
        return (self.base.cols, self.base.rows) if self.transposed else (self.base.rows, self.base.cols)


def resolve_side(side: SideChoice, out_features: int, in_features: int) -> Side:
    """`auto` projects the shorter side (ties: input), as GaLore and LoQT do."""
    if side != "auto":
        return side
    return "input" if in_features <= out_features else "output"


def choose_path(spec: LowRankSpec, tokens: int, *, backward: bool) -> LowRankPath:
    """The cheaper way to apply the low-rank term, in FLOPs.

    Forward on side input needs X P anyway (it is saved), and backward on side output needs dY P anyway, so there the
    branch costs only its second GEMM.
    """
    if spec.compute != "auto":
        return spec.compute
    rank, out_features, in_features = spec.projection.cols, *spec.features
    fold = 2 * out_features * in_features * rank
    already_there = (spec.applied_side == "output") if backward else (spec.applied_side == "input")
    if already_there:
        branch = 2 * tokens * rank * (in_features if backward else out_features)
    else:
        branch = 2 * tokens * rank * (in_features + out_features)
    return "fold" if fold <= branch else "branch"


def effective_weight(base: Tensor, projection: Tensor, factor: Tensor, spec: LowRankSpec) -> Tensor:
    """W_eff in place of `base`, a dense buffer of the caller's, in the form in which the weight is stored."""
    if spec.side == "input":
        return base.addmm_(factor, projection.T, alpha=spec.scale)
    return base.addmm_(projection, factor.T, alpha=spec.scale)


def _fold(weight: Tensor, projection: Tensor, factor: Tensor, spec: LowRankSpec) -> Tensor:
    """W_eff (O, I) in place of `weight`, which is (O, I)."""
    if spec.applied_side == "input":
        return weight.addmm_(factor, projection.T, alpha=spec.scale)
    return weight.addmm_(projection, factor.T, alpha=spec.scale)


def _applied(codes: Tensor, scales: Tensor | None, spec: LowRankSpec, dtype: torch.dtype) -> Tensor:
    """dequant(W_q), dense (O, I)."""
    stored = unpack(codes, scales, spec.base, dtype)
    return stored.T if spec.transposed else stored


def _matmul_weight(
    x_TI: Tensor, weight: Tensor, proj: Tensor, factor: Tensor, spec: LowRankSpec
) -> tuple[Tensor, Tensor | None]:
    """(y (T, O), X P or None): the forward product by the cheaper path. `weight` is consumed."""
    path = choose_path(spec, x_TI.shape[0], backward=False)
    xp_TR = x_TI @ proj if spec.applied_side == "input" else None
    if path == "fold":
        return x_TI @ _fold(weight, proj, factor, spec).T, xp_TR
    y_TO = x_TI @ weight.T
    if xp_TR is not None:
        return y_TO.addmm_(xp_TR, factor.T, alpha=spec.scale), xp_TR
    return y_TO.addmm_(x_TI @ factor, proj.T, alpha=spec.scale), None


def _input_gradient(
    dy_TO: Tensor, weight: Tensor, proj: Tensor, factor: Tensor, dyp_TR: Tensor | None, spec: LowRankSpec
) -> Tensor:
    """dX = dY W_eff (T, I) by the cheaper path. `weight` is consumed."""
    if choose_path(spec, dy_TO.shape[0], backward=True) == "fold":
        return dy_TO @ _fold(weight, proj, factor, spec)
    dx_TI = dy_TO @ weight
    if spec.applied_side == "input":
        return dx_TI.addmm_(dy_TO @ factor, proj.T, alpha=spec.scale)
    assert dyp_TR is not None
    return dx_TI.addmm_(dyp_TR, factor.T, alpha=spec.scale)


def once_differentiable(xp: Tensor, dy: Tensor, factor: Tensor) -> Tensor:
    """X P for a backward pass that may itself be recorded (`create_graph=True`).

    X is not kept on input side, so a gradient of B's gradient would lack its part by X: whoever asks for one is told.
    """
    if not torch.is_grad_enabled():
        return xp
    guarded: Tensor = OnlyOnce.apply(xp, dy, factor)
    return guarded


class OnlyOnce(torch.autograd.Function):
    """X P, whose gradient is not known; by dy and B, which stand beside it, its users' gradients come here."""

    @staticmethod
    def forward(ctx: Any, xp: Tensor, dy: Tensor, factor: Tensor) -> Tensor:
        return xp.view_as(xp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        raise UserError(
            "second derivatives by B of a LoQT layer are not known on input side, which keeps X P in the place of X; "
            "convert with LoQTConfig(side='output'), or take them of loqt_scale.to_dense(model)"
        )


class LowRankLinear(torch.autograd.Function):
    """See the module's docstring. Inputs: x (T, I), the packed W and P, B, and the probe (or None) with its Omega."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        base_codes: Tensor,
        base_scales: Tensor | None,
        proj_codes: Tensor,
        proj_scales: Tensor | None,
        factor: Tensor,
        probe: Tensor | None,
        omega: Tensor | None,
        spec: LowRankSpec,
    ) -> Tensor:
        dtype = x_TI.dtype
        weight = _applied(base_codes, base_scales, spec, dtype)
        proj = unpack(proj_codes, proj_scales, spec.projection, dtype)
        y_TO, xp_TR = _matmul_weight(x_TI, weight, proj, factor.to(dtype), spec)
        keeps_x = spec.applied_side == "output" or probe is not None
        ctx.save_for_backward(
            x_TI if keeps_x else None, xp_TR, base_codes, base_scales, proj_codes, proj_scales, factor, probe, omega
        )
        ctx.spec = spec
        ctx.width = None if probe is None else probe.shape[-1]
        return y_TO

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, xp_TR, base_codes, base_scales, proj_codes, proj_scales, factor, probe, omega = ctx.saved_tensors
        spec: LowRankSpec = ctx.spec
        dtype = dy_TO.dtype
        needs_x, needs_factor, needs_probe = (ctx.needs_input_grad[i] for i in (0, 5, 6))
        factor_c = factor.to(dtype)
        proj = unpack(proj_codes, proj_scales, spec.projection, dtype)
        dyp_TR = dy_TO @ proj if spec.applied_side == "output" else None
        d_x = d_factor = d_probe = None
        if needs_factor:
            if xp_TR is not None and needs_x:
                xp_TR = once_differentiable(xp_TR, dy_TO, factor)
            product = dy_TO.T @ xp_TR if spec.applied_side == "input" else x_TI.T @ dyp_TR
            d_factor = (spec.scale * product).to(factor.dtype)
        if needs_x:
            weight = _applied(base_codes, base_scales, spec, dtype)
            d_x = _input_gradient(dy_TO, weight, proj, factor_c, dyp_TR, spec)
            if probe is not None and torch.is_grad_enabled():
                d_x = d_x + _probe_term(dy_TO, probe.to(dtype), omega, spec)
        if needs_probe:
            d_probe = _probe_gradient(x_TI, dy_TO, omega, ctx.width, spec)
        return d_x, None, None, None, None, d_factor, d_probe, None, None


def _probe_term(dy_TO: Tensor, probe: Tensor, omega: Tensor | None, spec: LowRankSpec) -> Tensor:
    """What the probe adds to dX (T, I): zeros, through which a loss of dX (a penalty on it) has its part of dW."""
    if omega is None:
        return dy_TO @ (probe.T if spec.transposed else probe)
    width = probe.shape[1]
    if spec.applied_side == "input":
        return times_test_matrix(dy_TO, omega, width) @ probe.T
    identity = torch.eye(omega.shape[0], dtype=dy_TO.dtype, device=dy_TO.device)
    return dy_TO @ probe @ times_test_matrix(identity, omega, width).T


def _probe_gradient(x_TI: Tensor, dy_TO: Tensor, omega: Tensor | None, width: int, spec: LowRankSpec) -> Tensor:
    """The stored weight's dense gradient where omega is None, else its sketch (F, l), in float32 or wider."""
    wide = torch.promote_types(x_TI.dtype, torch.float32)
    if omega is None:
        return (x_TI.T @ dy_TO if spec.transposed else dy_TO.T @ x_TI).to(wide)
    if spec.applied_side == "input":
        return (x_TI.T @ times_test_matrix(dy_TO, omega, width)).to(wide)
    return (dy_TO.T @ times_test_matrix(x_TI, omega, width)).to(wide)
