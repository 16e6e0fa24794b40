"""What can be wrong with a step: numbers that are not finite (it is skipped), or ranks that are not all at it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loqt_scale.errors import UserError
from loqt_scale.functional.seeding import stable_seed


class NonFiniteLossError(UserError, FloatingPointError):
    """Too many steps in a row had a loss or gradient that was not finite."""


class UnreadableDataError(UserError):
    """A rank could not read its share of a step. Nobody has applied that step."""


class OutOfStepError(UserError):
    """Ranks disagree on the step they are at, or on whether a merge follows it."""


@dataclass(frozen=True)
class StepPlace:
    """Where a rank believes to be. The ranks' marks ride along when the losses are summed: no collective of their own.

    What a merge needs travels inside the backward pass of its step, before that step's losses are summed: so the step
    before announces it.

    Args:
        step: The step, from 0.
        merging: Whether a merge follows it.
        announcing: Whether a merge follows the next one.
    """

    step: int
    merging: bool
    announcing: bool = False

    @property
    def mark(self) -> int:
        """A number below 4096 that other places are unlikely to have; 4096 of them add up exactly in float32."""
        return stable_seed("place", self.step, self.merging, self.announcing) % 4096

    def check(self, marks: float, world_size: int) -> None:
        """Raises OutOfStepError unless the sum over ranks is what equal marks add up to."""
        if marks != world_size * self.mark:
            here, following = ("a merge" if merge else "no merge" for merge in (self.merging, self.announcing))
            raise OutOfStepError(
                f"here it is step {self.step}, after which {here} follows (after the next: {following}), but another "
                "rank is elsewhere (its own message says where); nothing was saved since. Start all ranks with the "
                "same code and settings; they go on from the last checkpoint"
            )


@dataclass(frozen=True)
class Words:
    """What a rank has to tell the others, one number that rides along when the losses are summed, as its place does.

    Args:
        stops: It is told to stop; of a sum: how many are.
        faults: It could not read its share of the step; of a sum: how many could not.
        saves: It asks all to save, which only rank 0 may.
    """

    stops: int
    faults: int
    saves: int

    def number(self, world_size: int) -> float:
        """Sums of up to 2895 ranks' numbers are exact in float32."""
        return float(self.saves + 2 * (self.stops + (world_size + 1) * self.faults))

    @classmethod
    def of_sum(cls, total: float, world_size: int) -> Words:
        """What the ranks' numbers add up to."""
        rest, saves = divmod(int(total), 2)
        faults, stops = divmod(rest, world_size + 1)
        return cls(stops, faults, saves)


class Health:
    """What the last steps were like. Every rank sees the same numbers, and so decides the same.

    Args:
        patience: So many skipped steps in a row end the run.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.skipped = 0
        self.in_a_row = 0
        self._last_good: dict[str, float] = {}

    def judge(self, done: int, loss: float, norm: float) -> str | None:
        """Takes a step's numbers; None if they are finite, else a warning for people.

        Args:
            done: Steps done, this one included.
            loss: Mean over tokens, nats.
            norm: Global gradient norm before clipping; if it is not finite, `Strategy.update` has applied nothing.

        Raises:
            NonFiniteLossError: This was one too many in a row.
        """
        values = {"train/loss": loss, "train/grad_norm": norm}
        if all(math.isfinite(value) for value in values.values()):
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
