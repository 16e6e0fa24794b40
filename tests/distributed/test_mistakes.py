"""What several ranks are told instead of hanging or drifting apart, and what they may do all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.pool import RankPool
from tests.distributed.test_adopted import TASKS as OWN_LOOPS
from tests.distributed.test_adopted import TOLERANCE

TASKS = "tests.distributed.mistake_tasks"


def test_each_rank_is_told_the_same(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.run(2, f"{TASKS}:mistakes", folder=str(tmp_path))
    assert first == second and first["saved"]
    assert "there are 2 ranks" in first["attached before the ranks met"]
    assert first["seed"] == "seed is 0 on rank 0 and 1 on rank 1; give the same on every rank"
    assert first["length"] == "total_steps is 8 on rank 0 and 9 on rank 1; give the same on every rank"
    assert "without join()" in first["join"]
    assert "merges.load_state_dict(state) on every rank" in first["state on one rank"]


def test_ranks_outside_of_the_mesh_are_told_of(ranks: RankPool) -> None:
    """Lightning's ModelParallelStrategy() shards over one rank of each node, unless it is told otherwise."""
    for rank, told in enumerate(ranks.run(2, f"{TASKS}:mesh_of_one")):
        assert len(told) == 1 and f"of ranks [{rank}], but there are 2 ranks: nothing sums these gradients" in told[0]
        assert "right if those have other layers (pipeline stages)" in told[0]


def test_evaluations_inside_a_step_change_nothing(ranks: RankPool) -> None:
    expected = ranks.run(1, f"{OWN_LOOPS}:train_own", how="single", scheme="none")[0]["losses"]
    for losses in ranks.run(2, f"{TASKS}:evaluates_in_a_step"):
        assert losses == pytest.approx(expected, abs=TOLERANCE["none"], rel=0)
