"""An optimizer step that is skipped where the gradient's norm is NaN or infinite, without asking the host."""

from __future__ import annotations

import torch
from torch import Tensor


def step_if_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Steps the optimizer unless the norm is NaN or infinite. Local.

    The norm is on the device, and the host should not wait for it. torch has a protocol for that, which its GradScaler
    uses: an optimizer with `_step_supports_amp_scaling` reads `found_inf`, a tensor; if it is not zero, weights,
    moments and step counts stay as they are. torch's fused AdamW and our `StreamedAdamW` follow it. For any other
    optimizer the host reads the norm, and waits.

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
