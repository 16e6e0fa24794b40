"""When merges happen, as pure functions of the step.

A merge at step u takes place after the optimizer step u. The first is at step 0, so that every run has a subspace from
its first gradient on. The i-th gap after it is (paper, section 3.3):

    exponential   T + floor(psi^i)       linear   T + floor(psi * i)       constant   T

With T = 100 and psi = 1.2 the merges are at 0, 101, 202, 303, 404, 506, ... (the published code counts its gaps one
step
off: 0, 100, 201, ...). Nothing is counted at run time: whether step u merges depends on u alone, so that a resumed run,
and every rank of it, agrees by construction.
"""

from __future__ import annotations

import math

from loqt_scale.config import GapSchedule, MergeConfig


def gap_after(index: int, *, gap: int, schedule: GapSchedule, growth: float) -> int:
    """Steps between merge number `index` and the next one (T_i of the paper)."""
    if schedule == "exponential":
        # beyond 2^60 steps no run notices; the cap keeps growth**index from overflowing a float
        return gap + (math.floor(growth**index) if index * math.log(max(growth, 1e-9)) < 41 else 2**60)
    if schedule == "linear":
        return gap + math.floor(growth * index)
    return gap


def merge_steps(
    total_steps: int, *, gap: int, schedule: GapSchedule, growth: float, last_step: int | None = None
) -> list[int]:
    """All merge steps below `total_steps` and not after `last_step`, ascending; step 0 is always the first.

    Raises:
        ValueError: `gap` below 1.
    """
    if gap < 1:
        raise ValueError(f"gap is {gap}; write 1 or more steps")
    end = total_steps if last_step is None else min(total_steps, last_step + 1)
    steps, step, index = [0], 0, 0
    while True:
        step += gap_after(index, gap=gap, schedule=schedule, growth=growth)
        index += 1
        if step >= end:
            return steps
        steps.append(step)


def planned_merges(merge: MergeConfig, total_steps: int, *, done: int | None = None) -> list[int]:
    """The merge steps of a run by its settings, of its first `done` steps only if that is given."""
    below, last = total_steps if done is None else done, merge.last_step(total_steps)
    return merge_steps(below, gap=merge.gap, schedule=merge.schedule, growth=merge.growth, last_step=last)
