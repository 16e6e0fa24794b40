"""Which steps of a run end in a merge: as planned (`functional.merge_steps`), or moved because something went wrong."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Iterable

from loqt_scale.config import MergeConfig
from loqt_scale.errors import UserError
from loqt_scale.functional.merge_steps import gap_after, planned_merges


class MergeSchedule:
    """See the module's docstring.

    Args:
        merge: Gap, its growth, the last step.
        total_steps: Of the run; None: it has no end that is known, and the plan grows with it.

    Raises:
        UserError: The last step is a fraction of a run without an end, or the number of steps is none.
    """

    def __init__(self, merge: MergeConfig, total_steps: int | None) -> None:
        self._merge, self._endless, self._total = merge, total_steps is None, _checked(total_steps)
        self._end_is_told = False
        if total_steps is None:
            if merge.last_step_fraction < 1.0:
                raise UserError(
                    f"loqt.merge.last_step_fraction is {merge.last_step_fraction}, a part of a run whose length is not "
                    "known; give total_steps, or leave last_step_fraction out"
                )
            self._planned = [0]
        else:
            self._planned = planned_merges(merge, total_steps)
        self._due = set(self._planned)

    def __contains__(self, step: int) -> bool:
        self._plan(step)
        return step in self._due

    @property
    def steps(self) -> list[int]:
        """All merge steps that are planned by now, ascending; of a run without an end those up to the next."""
        return sorted(self._due)

    @property
    def moved(self) -> list[int]:
        """Merge steps that were not planned, ascending."""
        return sorted(self._due - set(self._planned))

    def between(self, start: int, stop: int) -> list[int]:
        """Merge steps in [start, stop), ascending."""
        self._plan(stop)
        return [step for step in self.steps if start <= step < stop]

    def index(self, step: int) -> int:
        """How many merges were planned up to a step, less one."""
        self._plan(step)
        return bisect_right(self._planned, step) - 1

    def require(self, step: int) -> None:
        """Makes a step a merge step, if it is none."""
        self._plan(step)
        self._due.add(step)

    def restart(self, moved: Iterable[int]) -> None:
        """Has the steps merge that were planned and these, whatever was moved before."""
        self._due = {*self._planned, *moved}

    def words_at_end(self, step: int) -> list[str]:
        """What to say, once, of a step that comes after the run's last; nothing before."""
        if self._total is None or step < self._total or self._end_is_told:
            return []
        self._end_is_told = True
        return [
            f"step {step} comes after the {self._total} steps that attach(total_steps={self._total}) was told of: "
            "there are no merges any more, B trains on in its last subspace. Give total_steps of the whole run, or "
            "leave it out"
        ]

    def postpone(self, step: int) -> None:
        """Moves the merge of a step to the next one; if that ends in a merge anyway, the two are one."""
        self._plan(step + 1)
        self._due.remove(step)
        self._due.add(step + 1)

    def _plan(self, step: int) -> None:
        """Plans beyond a step."""
        merge = self._merge
        while self._endless and self._planned[-1] <= step:
            index = len(self._planned) - 1
            gap = gap_after(index, gap=merge.gap, schedule=merge.schedule, growth=merge.growth)
            self._planned.append(self._planned[-1] + gap)
            self._due.add(self._planned[-1])


def _checked(total_steps: int | None) -> int | None:
    """A number of steps.

    Raises:
        UserError: It is none.
    """
    try:
        total = None if total_steps is None or isinstance(total_steps, bool) else operator.index(total_steps)
    except TypeError:
        total = 0
    if total_steps is not None and (total is None or total < 1):
        raise UserError(
            f"total_steps is {total_steps!r}; give the number of optimizer steps of the whole run, 1 or more, or leave "
            "it out"
        )
    return total
