"""Gradients on their way to their owners, against a naive all-reduce of whole ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.merge_tasks import DEPTH, routed_merges
from tests.distributed.pool import RankPool

ALL = list(range(DEPTH))
SKETCH_BYTES = 4 * 16 * 16  # l = 8 used and 8 validation columns


def collect(ranks: RankPool, world_size: int, **arguments: Any) -> list[dict[str, Any]]:
    defaults = {"orders": [[ALL] * 2] * world_size, "known": True, "wave": 1, "budget": 2 * SKETCH_BYTES}
    return ranks.run(world_size, "tests.distributed.merge_tasks:collect", **{**defaults, **arguments})


@pytest.mark.parametrize("world_size", [2, 3])
def test_owners_get_the_sums_inside_the_last_pass_and_nobody_holds_all(ranks: RankPool, world_size: int) -> None:
    for result in collect(ranks, world_size):
        assert result["error"] < 1e-5
        # but for the last wave or two all were factorised inside the pass; what is left of these, and two in the air
        assert result["early"] >= DEPTH // world_size - 1 and result["held"] <= 4 < DEPTH
        assert max(result["waves"]) <= 2


def test_layers_of_a_wave_come_together(ranks: RankPool) -> None:
    for result in collect(ranks, 2, wave=3):
        assert result["error"] < 1e-5 and max(result["waves"]) == 3


def test_if_the_passes_are_not_known_all_is_sent_in_the_end(ranks: RankPool) -> None:
    for result in collect(ranks, 2, known=False):
        assert result["error"] < 1e-5 and result["early"] == 0 and result["held"] == DEPTH


def test_ranks_whose_passes_differ_do_not_wait_for_ever(ranks: RankPool) -> None:
    """One uses its layers backwards, leaves some out in one pass and one of them in both."""
    orders = [[ALL, ALL], [ALL[::-1], [4, 1, 0]]]
    for result in collect(ranks, 2, orders=orders):
        assert result["error"] < 1e-5
    orders = [[ALL, ALL, ALL], [[6, 5], ALL, [0, 3, 2]]]
    for result in collect(ranks, 2, orders=orders):
        assert result["error"] < 1e-5


@pytest.mark.parametrize("passes", [1, 2])
def test_what_is_dropped_leaves_nothing_on_the_way(ranks: RankPool, passes: int) -> None:
    assert max(ranks.run(2, "tests.distributed.merge_tasks:drop_then_collect", passes=passes)) < 1e-5


@pytest.mark.parametrize("known", [True, False])
def test_layers_that_some_ranks_or_none_have_used_merge_as_in_one_process(ranks: RankPool, known: bool) -> None:
    one = routed_merges(known=known)
    assert one["kept"][0] == [] and one["kept"][2] == [f"layers.{index}" for index in (0, 1, 5, 6)]
    for several in ranks.run(2, "tests.distributed.merge_tasks:routed_merges", known=known):
        assert several["kept"] == one["kept"]
        for name, value in one["model"].items():
            if not name.endswith(("codes", "scales")):  # packed bytes may round apart
                torch.testing.assert_close(several["model"][name], value, rtol=1e-3, atol=1e-4)
