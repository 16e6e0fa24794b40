"""Weights before quantization that several ranks give: distributed ones of experts, and unequal ones."""

from __future__ import annotations

import pytest

from tests.distributed.pool import RankPool

TASK = "tests.distributed.source_tasks:"


@pytest.mark.parametrize(
    ("scheme", "init", "near"), [("none", "zero", 1e-5), ("nf4", "zero", 1e-3), ("nf4", "loftq", 1e-3)]
)
def test_three_experts_over_two_ranks_merge_as_one_process_does(
    ranks: RankPool, scheme: str, init: str, near: float
) -> None:
    (alone,) = ranks.run(1, f"{TASK}merge_experts", scheme=scheme, init=init)
    for several in ranks.run(2, f"{TASK}merge_experts", scheme=scheme, init=init, timeout=60.0):
        assert several["merged"] == alone["merged"] == 3
        assert several["losses"] == pytest.approx(alone["losses"], rel=near)


def test_ranks_that_give_different_kinds_are_told_so(ranks: RankPool) -> None:
    for said in ranks.run(2, f"{TASK}unequal_kinds", timeout=60.0):
        assert "initial_weights are whole tensors on rank 0 and none on rank 1; give the same on every rank" in said
