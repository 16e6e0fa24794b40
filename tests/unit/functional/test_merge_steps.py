"""Merge steps: the paper's, and what holds for all."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loqt_scale.config import GapSchedule
from loqt_scale.functional.merge_steps import gap_after, merge_steps


def test_exponential_is_the_papers() -> None:
    gaps = [100 + int(1.2**i) for i in range(9)]
    expected = [0]
    for gap in gaps:
        expected.append(expected[-1] + gap)
    steps = merge_steps(expected[-1] + 1, gap=100, schedule="exponential", growth=1.2)
    assert steps == expected
    assert steps[:6] == [0, 101, 202, 303, 404, 506]


def test_linear_and_constant() -> None:
    assert merge_steps(40, gap=10, schedule="constant", growth=9.0) == [0, 10, 20, 30]
    assert merge_steps(40, gap=10, schedule="linear", growth=2.0) == [0, 10, 22, 36]


@given(
    total=st.integers(1, 5000),
    gap=st.integers(1, 400),
    growth=st.floats(0.0, 3.0),
    schedule=st.sampled_from(["exponential", "linear", "constant"]),
)
def test_gaps_never_shrink_and_start_at_zero(total: int, gap: int, growth: float, schedule: GapSchedule) -> None:
    steps = merge_steps(total, gap=gap, schedule=schedule, growth=growth)
    assert steps[0] == 0 and steps[-1] < total
    gaps = [b - a for a, b in pairwise(steps)]
    assert all(g >= gap for g in gaps)
    if growth >= 1.0:
        assert gaps == sorted(gaps)


def test_huge_indices_do_not_overflow() -> None:
    assert gap_after(10**6, gap=100, schedule="exponential", growth=1.2) > 10**9


def test_last_step_bounds_merges() -> None:
    assert merge_steps(100, gap=10, schedule="constant", growth=1.0, last_step=50) == [0, 10, 20, 30, 40, 50]


def test_gap_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="write 1 or more"):
        merge_steps(10, gap=0, schedule="constant", growth=1.0)
