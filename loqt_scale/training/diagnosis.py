"""What is wrong with a run, from what its merges report: one line, with the setting to change.

    the subspace is frozen    P holds of the gradient what the old P held: a merge only quantizes anew
    the update is lost        re-quantization rounds away most of what was folded into W
    the loss rises            it is well above what it was between earlier merges, or in the first step: the learning
                              rates are too high

The thresholds are from short runs, sound and spoilt on purpose (docs/training.md has the numbers); no sound one is told
anything. What cannot be seen here is a rate that is too high, or too low, and trains all the same: neither
survival, gradient energy nor clipping tell it from a good one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import median

from torch import nn

from loqt_scale.config import LoQTConfig, OptimConfig
from loqt_scale.data.mixing import MOST_EPOCHS, repeated_often
from loqt_scale.layers import loqt_layers
from loqt_scale.merge import MergeReport
from loqt_scale.metrics import Reminder

FROZEN, FROZEN_MERGES = 0.9, 3  # overlap by energy beyond chance, in so many merges in a row
MOST_CHANCE = 0.4  # of a P that says something: one that spans more holds most of any gradient, the next merge's too
LOST = 0.5  # survival below this
RISE, WINDOW = 0.2, 20  # nats above the best mean of so many steps or more
RISE_ABOVE_FIRST = 1.0  # nats above the first step's loss, which is that of one batch


def subspace_is_frozen(reports: list[MergeReport], chance: Mapping[str, float]) -> bool:
    """Whether each of the last merges found nearly the P that was there, in most layers.

    Args:
        reports: Merges, ascending.
        chance: See `chance_overlaps`.
    """
    last = reports[-FROZEN_MERGES:]
    return len(last) == FROZEN_MERGES and all(_median_excess(report, chance) > FROZEN for report in last)


def _median_excess(report: MergeReport, chance: Mapping[str, float]) -> float:
    """Overlap by energy scaled to 0 for unrelated subspaces and 1 for equal ones; a P that spans most says nothing.

    By energy: P's last columns follow the batch and the sketch, so that half of P is new in each merge even where the
    weights do not move at all.
    """
    found = [
        (layer["energy_overlap"] - chance[name]) / (1.0 - chance[name])
        for name, layer in report.layers.items()
        if layer["energy_overlap"] == layer["energy_overlap"] and chance[name] <= MOST_CHANCE
    ]
    return median(found) if found else 0.0


def update_is_lost(report: MergeReport) -> bool:
    """Whether most layers lost more than half of their update in a merge."""
    found = [layer["update_survival"] for layer in report.layers.values()]
    found = [value for value in found if value == value]
    return bool(found) and median(found) < LOST


def loss_rises(windows: list[float], first: float = math.inf) -> bool:
    """Whether the last of the mean losses (nats, ascending in time) is well above the best one before it, or `first`.

    A rate that is high enough has the first mean blown up already, which then is no measure for the others.
    """
    above_first = bool(windows) and windows[-1] > first + RISE_ABOVE_FIRST
    return above_first or (len(windows) > 1 and windows[-1] > min(windows[:-1]) + RISE)


def chance_overlaps(model: nn.Module) -> dict[str, float]:
    """By LoQT layer, the overlap of two unrelated subspaces: r / features of the side that P is on."""
    return {name: layer.rank / layer.spec.each.projection.rows for name, layer in loqt_layers(model)}


class Diagnosis:
    """Listens to a run's losses and merges, and tells what is wrong: once, and again at growing distances.

    Args:
        loqt: The method's settings, from which the advice starts.
        optim: Likewise.
        chance: See `chance_overlaps`.
        tell: Takes a line for people.
    """

    def __init__(
        self, loqt: LoQTConfig, optim: OptimConfig, chance: Mapping[str, float], tell: Callable[[str], None]
    ) -> None:
        self._loqt, self._optim, self._chance = loqt, optim, chance
        self._reports: list[MergeReport] = []
        self._total, self._count = 0.0, 0  # of the losses since the last merge that was judged
        self._windows: list[float] = []
        self._first = math.inf  # the first step's loss
        self._frozen, self._lost, self._rising = (Reminder(tell) for _ in range(3))
        self._tell, self._repeated = tell, set[str]()

    def take_loss(self, loss: float) -> None:
        """The loss of a step that was applied, in nats."""
        self._first = loss if math.isinf(self._first) else self._first
        self._total, self._count = self._total + loss, self._count + 1

    def take_epochs(self, epochs: Mapping[str, float]) -> None:
        """How many times sources have been read by now whose length was not known beforehand."""
        often = {name: count for name, count in epochs.items() if count > MOST_EPOCHS and name not in self._repeated}
        for name, count in often.items():
            self._tell(f"WARNING: {repeated_often(name, f'has been read {count:.1f} times')}")
        self._repeated.update(often)

    def take_merge(self, report: MergeReport) -> None:
        """What the merge after the last step says of itself."""
        self._reports = [*self._reports[1 - FROZEN_MERGES :], report]
        frozen = subspace_is_frozen(self._reports, self._chance)
        self._judge(self._frozen, frozen, self._of_frozen, "merges find new subspaces again")
        self._judge(self._lost, update_is_lost(report), self._of_lost, "updates survive merges again")
        if self._count >= WINDOW:
            self._windows = [*self._best(), self._total / self._count]
            self._total, self._count = 0.0, 0
            self._judge(
                self._rising, loss_rises(self._windows, self._first), self._of_rising, "the loss has come down again"
            )

    def _best(self) -> list[float]:
        return [min(self._windows)] if self._windows else []

    @staticmethod
    def _judge(reminder: Reminder, trouble: bool, text: Callable[[], str], over: str) -> None:
        if trouble:
            reminder.trouble(text())
        else:
            reminder.over(over)

    def _of_frozen(self) -> str:
        gap = self._loqt.merge.gap
        return (
            "the last merges found the subspace that was there, which costs their time and changes little; merge less "
            f"often (loqt.merge.gap: {2 * gap} instead of {gap}). If the loss falls slowly, raise optim.lr "
            f"{self._optim.lr:g}, or give B more directions (a larger loqt.rank than {self._loqt.rank})"
        )

    def _of_lost(self) -> str:
        lost = median(x for x in (v["update_survival"] for v in self._reports[-1].layers.values()) if x == x)
        return (
            f"the merge kept {max(0.0, lost):.0%} of the update (most layers): re-quantization rounds the rest away; "
            f"write {_against_rounding(self._loqt)}"
        )

    def _of_rising(self) -> str:
        before, now = min(self._first, *self._windows), self._windows[-1]
        optim = self._optim
        rates = f"optim.lr {optim.lr:g}" + (
            "" if optim.full_precision_lr is None else f" or optim.full_precision_lr {optim.full_precision_lr:g}"
        )
        return (
            f"the mean loss since the last merge is {now:.3f} and was {before:.3f} before; unless the text has "
            f"changed, lower {rates} (to a third, say), or lengthen the warm-up"
        )


def _against_rounding(loqt: LoQTConfig) -> str:
    """The first setting that is not yet as good as it gets against the loss of updates."""
    merge, quantization = loqt.merge, loqt.quantization
    if merge.compensation_rounds < 5:
        return "loqt.merge.compensation_rounds: 5"
    finer = "" if quantization.weight == "int8" else ", or loqt.quantization.weight: int8"
    return (
        f"a larger loqt.merge.gap than {merge.gap} or loqt.merge.last_step_fraction: 0.8 (updates that have grown, or "
        f"are large, survive), a larger loqt.rank than {loqt.rank}{finer}"
    )
