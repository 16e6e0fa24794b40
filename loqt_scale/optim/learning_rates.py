"""Learning rates over a run: a warm-up, then one of four shapes, as pure functions of the step.

    cosine     half a cosine from the peak down to `final_fraction`
    linear     a straight line down to it
    wsd        warm-up, stable, decay: the peak until the last part of the run, then down to `final_fraction`
    constant   the peak

Every rate is a fraction of its group's peak (`optim.lr`, `optim.full_precision_lr`). Cosine and line depend on the
run's length from the end of the warm-up on. Under wsd (MiniCPM, arXiv 2404.06395) nothing does before the decay, so a
run can be made longer from there as if it had been longer from its beginning.

The decay of wsd is 1 - sqrt(p), p being the share of it that is done. Hagele et al. (arXiv 2405.18392, section 3) tried
it against the straight line on several lengths and sizes: it ended lower, and with a fifth of the steps as low as a
cosine of the same length.

The warm-up is fixed when a run begins (a fraction of the steps that it has then). A run that is trained on keeps it, so
that one that is over never comes back.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Self

import torch
from torch.optim.lr_scheduler import LambdaLR

from loqt_scale.config import OptimConfig, RateSchedule


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """The learning rates of a run of a known length, as fractions of their peak.

    Args:
        shape: What follows the warm-up.
        total_steps: Steps of the run, 1 or more.
        warmup_steps: Steps of the line up to the peak; step `warmup_steps - 1` is the first at the peak.
        decay_steps: wsd: steps of the decay, the last ones; fewer if the warm-up leaves less room.
        final_fraction: Fraction of the peak at the last step (of `constant`: not used).
    """

    shape: RateSchedule
    total_steps: int
    warmup_steps: int
    decay_steps: int
    final_fraction: float

    @classmethod
    def of_run(cls, optim: OptimConfig, total_steps: int, *, warmup_steps: int | None = None) -> Self:
        """Those that a run's settings ask for.

        Args:
            optim: The settings.
            total_steps: Steps of the run.
            warmup_steps: Of a run that goes on: the warm-up with which it began. Default: the settings'.
        """
        return cls(
            shape=optim.schedule,
            total_steps=total_steps,
            warmup_steps=optim.warmup_of(total_steps) if warmup_steps is None else warmup_steps,
            decay_steps=max(1, round(optim.decay_fraction * total_steps)),
            final_fraction=optim.final_lr_fraction,
        )

    @property
    def stable_steps(self) -> int:
        """The first so many steps do not depend on how long the run is."""
        if self.shape == "constant":
            return self.total_steps
        if self.shape == "wsd":
            return max(1, min(self.warmup_steps, self.total_steps), self.total_steps - self.decay_steps)
        return min(self.warmup_steps, self.total_steps)

    @property
    def branching_step(self) -> int | None:
        """wsd: steps done when the decay begins, from where a longer run can branch off; else None."""
        return self.stable_steps if self.shape == "wsd" else None

    def factor(self, step: int) -> float:
        """The fraction of the peak with which step `step` (from 0) is taken; after the last step the last one's."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - 1 - self.warmup_steps)
        return self.final_fraction + (1.0 - self.final_fraction) * self._height(step, min(1.0, progress))

    def _height(self, step: int, progress: float) -> float:
        """How much of the way from the final fraction up to the peak is left: from 1 to 0."""
        match self.shape:
            case "cosine":
                return 0.5 * (1.0 + math.cos(math.pi * progress))
            case "linear":
                return 1.0 - progress
            case "wsd":
                decayed = step + 1 - self.stable_steps
                return 1.0 - math.sqrt(min(1.0, max(0, decayed) / max(1, self.total_steps - self.stable_steps)))
            case "constant":
                return 1.0

    def agrees(self, other: Self, steps: int) -> bool:
        """Whether another run of these settings, of another length, takes its first `steps` steps at the same rates."""
        same_warmup = self.warmup_steps == other.warmup_steps
        return self == other or (same_warmup and steps <= min(self.stable_steps, other.stable_steps))

    def describe(self) -> str:
        """For people: `cosine: 100 steps of warm-up, then down to 0.1 of the peak at step 1000`."""
        if self.warmup_steps and self.warmup_steps >= self.total_steps - 1:
            return f"{self.shape}: {self.warmup_steps} of {self.total_steps} steps are warm-up, to the end"
        end = f"down to {self.final_fraction:g} of the peak at step {self.total_steps}"
        rest = {"wsd": f"the peak until step {self.stable_steps}, then {end}", "constant": "the peak"}
        warmup = f"{self.warmup_steps} steps of warm-up, then " if self.warmup_steps else ""
        return f"{self.shape}: {warmup}{rest.get(self.shape, end)}"


def describe_rates(optim: OptimConfig, total_steps: int, *, warmup_steps: int | None = None) -> str:
    """For people: the peaks of both groups, and what becomes of them in a run of so many steps (see `of_run`)."""
    rest = optim.lr if optim.full_precision_lr is None else optim.full_precision_lr
    warmup, asked = optim.warmup_of(total_steps), optim.warmup_steps or 0
    shrunk = f" (optim.warmup_steps {asked} would fill this run)" if warmup < asked and warmup_steps is None else ""
    schedule = LearningRates.of_run(optim, total_steps, warmup_steps=warmup_steps).describe()
    return f"{optim.lr:g} (embeddings, norms, head: {rest:g}); {schedule}{shrunk}"


def create_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, total_steps: int) -> LambdaLR:
    """The rates of a run of so many steps on every group of an optimizer whose groups hold their peaks."""
    return LambdaLR(optimizer, LearningRates.of_run(config, total_steps).factor)


def set_schedule_position(scheduler: LambdaLR, steps: int) -> None:
    """Puts the scheduler, and the groups' rates, where `steps` calls of `step` would have put them."""
    scheduler.last_epoch = steps - 1
    with warnings.catch_warnings():  # that no update came before: true, and meant
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
        scheduler.step()
