"""An update that is left out, on the device, where the gradient's norm is not finite."""

from __future__ import annotations

import torch
from torch import Tensor


def step_if_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Steps the optimizer unless the norm is NaN or infinite. Local.

    Both of ours, torch's fused AdamW and `StreamedAdamW`, take the verdict as a tensor (as they would from a gradient
    scaler) and leave moments, weights and step counts alone: the host does not wait for the device. For any other the
    host reads it.

    Args:
        optimizer: Any.
        norm: Global gradient norm, scalar, on the device of the gradients.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
    elif bool(torch.isfinite(norm)):
        optimizer.step()
