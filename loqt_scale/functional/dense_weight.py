"""W_eff as a dense matrix that takes part in autograd, for code that reads a layer's `weight` instead of calling it.

M is the weight as it is stored (see `low_rank_linear`), dM its gradient. Here it exists as a whole: that is the price.

    side input   M = M_q + s B P^T    dB = s dM P      sketch dM^T Omega
    side output  M = M_q + s P B^T    dB = s dM^T P    sketch dM Omega
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loqt_scale.functional.low_rank_linear import LowRankSpec, effective_weight
from loqt_scale.functional.projection import times_test_matrix
from loqt_scale.functional.quantization import unpack


class DenseWeight(torch.autograd.Function):
    """See the module's docstring. Inputs: the packed W and P, B, the probe (or None) with its Omega, the dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        base_codes: Tensor,
        base_scales: Tensor | None,
        proj_codes: Tensor,
        proj_scales: Tensor | None,
        factor: Tensor,
        probe: Tensor | None,
        omega: Tensor | None,
        spec: LowRankSpec,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(proj_codes, proj_scales, factor, omega)
        ctx.spec = spec
        ctx.width = None if probe is None else probe.shape[-1]
        proj = unpack(proj_codes, proj_scales, spec.projection, dtype)
        return effective_weight(unpack(base_codes, base_scales, spec.base, dtype), proj, factor.to(dtype), spec)

    @staticmethod
    def backward(ctx: Any, d_weight: Tensor) -> tuple[Tensor | None, ...]:
        proj_codes, proj_scales, factor, omega = ctx.saved_tensors
        spec: LowRankSpec = ctx.spec
        dtype = d_weight.dtype
        turned = d_weight if spec.side == "input" else d_weight.T
        d_factor = d_probe = None
        if ctx.needs_input_grad[4]:
            proj = unpack(proj_codes, proj_scales, spec.projection, dtype)
            d_factor = (spec.scale * (turned @ proj)).to(factor.dtype)
        if ctx.needs_input_grad[5]:
            wide = torch.promote_types(dtype, torch.float32)
            d_probe = (d_weight if omega is None else times_test_matrix(turned.T, omega, ctx.width)).to(wide)
        return None, None, None, None, d_factor, d_probe, None, None, None
