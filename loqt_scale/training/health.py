"""Steps whose loss or gradient is not finite: they are skipped, and too many in a row end the run.

One number decides, the gradient's norm: on the device, where whoever applies the update reads it, and on the host,
which reads it a step later. A loss that is not finite may have a finite gradient (a target of probability 0), so it is
made to have none (`spoil_gradient`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loqt_scale.errors import UserError


class NonFiniteLossError(UserError, FloatingPointError):
    """Too many steps in a row had a loss or gradient that was not finite."""


def spoil_gradient(loss: Tensor) -> Tensor:
    """The loss (any shape), whose gradient is NaN if the loss is not finite. Local; the host does not wait for it."""
    return loss * torch.where(loss.isfinite(), 1.0, math.nan)


class Health:
    """Decides whether a step counts. Every rank sees the same numbers, and so decides the same.

    Args:
        patience: So many skipped steps in a row end the run.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.skipped = 0
        self.in_a_row = 0
        self._last_good: dict[str, float] = {}

    def judge(self, done: int, loss: float, norm: float) -> str | None:
        """Takes a step's numbers; None if the update was applied, else a warning for people.

        Args:
            done: Steps done, this one included.
            loss: Mean over tokens, nats.
            norm: Global gradient norm before clipping; if it is not finite, `Step.update` has applied nothing. Where
                the loss is not finite, nor is the norm (`spoil_gradient`).

        Raises:
            NonFiniteLossError: This was one too many in a row.
        """
        values = {"train/loss": loss, "train/grad_norm": norm}
        if math.isfinite(norm):
            self.in_a_row = 0
            self._last_good = {"step": done, **values}
            return None
        self.skipped += 1
        self.in_a_row += 1
        what = f"step {done}: loss {loss}, gradient norm {norm}; the update was not applied"
        if self.in_a_row < self.patience:
            return f"{what} ({self.in_a_row} in a row; {self.patience} end the run, see optim.max_skipped_steps)"
        good = ", ".join(f"{key} {value:.6g}" for key, value in self._last_good.items()) or "none yet"
        raise NonFiniteLossError(
            f"{what}, {self.in_a_row} in a row. Last good values: {good}. Lower optim.lr or optim.full_precision_lr, "
            "lengthen the warm-up (optim.warmup_fraction), or look at the data of this step"
        )
