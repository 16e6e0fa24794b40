"""Learning rates over a run: every shape's parts, bounds and ends, and what a longer run has in common."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from loqt_scale.config import OptimConfig
from loqt_scale.optim import LearningRates, create_scheduler, describe_rates, set_schedule_position

SHAPES = ["cosine", "wsd", "linear", "constant"]
FRACTIONS = st.just(0.0) | st.floats(0.001, 1.0)


@st.composite
def runs(draw: st.DrawFn, shapes: list[str] = SHAPES) -> LearningRates:
    """Of any settings that are taken, and any number of steps."""
    warmup = draw(st.sampled_from(["warmup_steps", "warmup_fraction", ""]))
    number = st.integers(0, 400) if warmup == "warmup_steps" else FRACTIONS.map(lambda fraction: fraction / 2)
    optim = OptimConfig(
        schedule=draw(st.sampled_from(shapes)),  # type: ignore[arg-type]
        decay_fraction=draw(st.floats(0.01, 0.5)),
        final_lr_fraction=draw(FRACTIONS),
        **({warmup: draw(number)} if warmup else {}),
    )
    return LearningRates.of_run(optim, draw(st.integers(1, 300)))


@given(runs())
def test_up_to_the_peak_and_never_up_again(rates: LearningRates) -> None:
    factors = [rates.factor(step) for step in range(rates.total_steps)]
    warmup = rates.warmup_steps
    assert warmup < rates.total_steps or (warmup, rates.total_steps) == (1, 1)
    assert factors[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert all(later <= earlier for earlier, later in pairwise(factors[max(0, warmup - 1) :]))
    assert all(0.0 < factor <= 1.0 for factor in factors[: max(1, warmup)])
    assert all(rates.final_fraction - 1e-15 <= factor <= 1.0 for factor in factors[warmup:])


@given(runs())
def test_the_last_step_is_at_the_final_fraction(rates: LearningRates) -> None:
    assume(rates.warmup_steps < rates.total_steps - 1)  # room to come down
    end = 1.0 if rates.shape == "constant" else rates.final_fraction
    for after in (0, 1, 7, 10**6):
        assert rates.factor(rates.total_steps - 1 + after) == pytest.approx(end, abs=1e-12)


@given(runs(["wsd"]))
def test_wsd_stays_at_the_peak_and_comes_down_as_one_minus_a_root(rates: LearningRates) -> None:
    stable, total = rates.stable_steps, rates.total_steps
    assert rates.branching_step == stable >= max(1, min(rates.warmup_steps, total))
    assert {rates.factor(step) for step in range(rates.warmup_steps, stable)} <= {1.0}
    assert total - stable <= rates.decay_steps
    for step in range(stable, total):
        left = 1.0 - math.sqrt((step + 1 - stable) / (total - stable))
        assert rates.factor(step) == pytest.approx(rates.final_fraction + (1.0 - rates.final_fraction) * left)


@given(runs(), st.integers(1, 300))
def test_a_longer_run_begins_as_this_one_does(rates: LearningRates, more: int) -> None:
    longer = replace(rates, total_steps=rates.total_steps + more, decay_steps=rates.decay_steps + more // 3)
    same = min(rates.stable_steps, longer.stable_steps)
    assert rates.agrees(longer, same) and rates.agrees(rates, rates.total_steps)
    assert [rates.factor(step) for step in range(same)] == [longer.factor(step) for step in range(same)]
    if rates.final_fraction < 0.99 and rates.shape == "wsd" and rates.warmup_steps < rates.stable_steps:
        assert not rates.agrees(longer, same + 1)
        assert rates.factor(same) != longer.factor(same)


def test_cosine_and_line_in_numbers() -> None:
    how = {"total_steps": 9, "warmup_steps": 4, "decay_steps": 1, "final_fraction": 0.2}
    cosine, line = (LearningRates(shape=shape, **how) for shape in ("cosine", "linear"))  # type: ignore[arg-type]
    for rates in (cosine, line):
        assert [rates.factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [line.factor(step) for step in range(5, 9)] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert [cosine.factor(step) for step in (6, 8)] == pytest.approx([0.6, 0.2])


def test_the_warm_up_shrinks_only_with_a_run_that_it_would_fill() -> None:
    optim = OptimConfig(warmup_steps=100)
    assert [optim.warmup_of(steps) for steps in (1000, 101, 100, 50, 9, 1)] == [100, 100, 10, 5, 0, 0]
    for steps in (1, 9, 50):
        rates = [LearningRates.of_run(optim, steps).factor(step) for step in range(steps)]
        assert max(rates) == 1.0 and min(rates) > 0.0


@pytest.mark.parametrize("shape", SHAPES)
def test_both_groups_follow_from_any_position(shape: str) -> None:
    optim = OptimConfig(schedule=shape, warmup_fraction=0.2)  # type: ignore[arg-type]
    rates = LearningRates.of_run(optim, 20)
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.5, 0.25)]
    optimizer = torch.optim.AdamW(groups)
    scheduler = create_scheduler(optimizer, optim, 20)
    for step in (0, 3, 19, 7):
        set_schedule_position(scheduler, step)
        assert [group["lr"] for group in optimizer.param_groups] == [lr * rates.factor(step) for lr in (0.5, 0.25)]


def test_they_are_described() -> None:
    optim = OptimConfig(lr=0.01, full_precision_lr=0.005, warmup_fraction=0.1)
    text = "0.01 (embeddings, norms, head: 0.005); "
    down = "down to 0.1 of the peak at step 200"
    assert describe_rates(optim, 200) == f"{text}cosine: 20 steps of warm-up, then {down}"
    assert describe_rates(replace(optim, schedule="linear", warmup_fraction=0.0), 200) == f"{text}linear: {down}"
    assert describe_rates(replace(optim, schedule="constant"), 200).endswith("then the peak")
    wsd = describe_rates(replace(optim, schedule="wsd"), 200)
    assert wsd == f"{text}wsd: 20 steps of warm-up, then the peak until step 160, then {down}"
    short = replace(optim, warmup_fraction=None, warmup_steps=1000)
    assert describe_rates(short, 200).endswith("(optim.warmup_steps 1000 would fill this run)")
