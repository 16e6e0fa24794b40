"""Muon on any number of ranks: its one exchange, a Gram matrix a layer, makes the steps of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.runs import Runs, SavedRuns, seldom
from tests.distributed.test_equivalence import ODD, UNQUANTIZED, assert_same_losses

MUON = {"optim.name": "muon", "optim.lr": 5e-3, "optim.full_precision_lr": 5e-3}
# shards of ZeRO end inside rows of B (see test_equivalence.ODD)
CUT = {**MUON, **UNQUANTIZED, "model.overrides": ODD, "loqt.rank_pattern": {"*.up_proj": 5}}
INT8 = {**MUON, **UNQUANTIZED, "model.overrides": ODD, "optim.states": "int8", "loqt.rank": 32}
DENSE = {**MUON, "method": "full", "optim.lr": 2e-3, "model.overrides": ODD}
FRUGAL = {"model.dtype": "bfloat16", "model.trained_dtype": "bfloat16", "loqt.rank": 32, "optim.states": "int8"}


@pytest.mark.parametrize(
    ("world_size", "strategy"),
    [
        (3, "fsdp"),
        (2, "zero-2"),
        (2, "zero-3"),
        *seldom((2, "ddp"), (2, "fsdp"), (3, "ddp"), (2, "zero-1"), (3, "zero-3")),
    ],
)
def test_strategies_equal_the_single_process(runs: Runs, world_size: int, strategy: str) -> None:
    """Through merges, whose transport moves the one moment too."""
    assert_same_losses(runs.losses(world_size, strategy, **CUT), runs.losses(1, "single", **CUT), exact=True)


@pytest.mark.parametrize(("world_size", "strategy"), [(3, "fsdp"), *seldom((2, "ddp"), (2, "zero-2"), (3, "zero-3"))])
def test_full_rank_linears_too(runs: Runs, world_size: int, strategy: str) -> None:
    """One process takes the smaller side's Gram matrix, shards that of the columns."""
    assert_same_losses(runs.losses(world_size, strategy, **DENSE), runs.losses(1, "single", **DENSE), exact=True)


@pytest.mark.parametrize(
    ("world_size", "strategy", "settings"),
    [
        (2, "zero-1", {"parallel.zero_offload": "optimizer", "train.micro_batch_size": 1}),
        (2, "fsdp", {"optim.compile": True}),
        *seldom(
            (1, "single", {"train.micro_batch_size": 2}),
            (2, "fsdp", {"train.micro_batch_size": 1}),
            (1, "single", {"optim.compile": True, "optim.clip_norm": 0.0, "optim.per_layer": True}),
            (3, "zero-3", {"optim.compile": True}),
        ),
    ],
)
def test_passes_and_places_change_nothing(runs: Runs, world_size: int, strategy: str, settings: dict[str, Any]) -> None:
    losses = runs.losses(world_size, strategy, **CUT, **settings)
    unclipped = {"optim.clip_norm": 0.0} if "optim.clip_norm" in settings else {}
    assert_same_losses(losses, runs.losses(1, "single", **CUT, **unclipped), exact=True)


@pytest.mark.parametrize(("world_size", "strategy"), [(3, "fsdp"), *seldom((1, "single"))])
def test_updates_in_the_backward_pass_change_nothing(runs: Runs, world_size: int, strategy: str) -> None:
    unclipped = {**CUT, "optim.clip_norm": 0.0}
    losses = runs.losses(world_size, strategy, **unclipped, **{"optim.per_layer": True})
    assert_same_losses(losses, runs.losses(1, "single", **unclipped), exact=True)


@pytest.mark.parametrize(("world_size", "strategy"), seldom((2, "zero-1"), (2, "ddp"), (3, "fsdp"), (2, "zero-3")))
def test_momentum_in_8_bits_learns_as_float32_does(runs: Runs, world_size: int, strategy: str) -> None:
    """Codes that fall to the other side move losses by what 8 bits move them, not by more."""
    reference, float32 = (
        runs.losses(1, "single", **INT8),
        runs.losses(1, "single", **{**INT8, "optim.states": "float32"}),
    )
    losses = runs.losses(world_size, strategy, **INT8)
    assert max(abs(a - b) for a, b in zip(losses[:5], reference[:5], strict=True)) < 1e-3
    for others in (losses, float32):
        assert sum(others[-5:]) / 5 == pytest.approx(sum(reference[-5:]) / 5, rel=0.02)


@pytest.mark.long
def test_offloading_changes_no_bit(runs: Runs) -> None:
    settings = {**MUON, **FRUGAL, "train.micro_batch_size": 4}
    assert runs.losses(1, "single-all", **settings) == runs.losses(1, "single", **settings)


SAVED = {**INT8, "loqt.rank_pattern": {"*.up_proj": 48}, "checkpoint.every": 8, "train.steps": 14}


@pytest.mark.parametrize(
    ("world_size", "strategy", "other"),
    [
        (2, "zero-3", (1, "single")),
        *seldom((1, "single", (2, "zero-2")), (2, "fsdp", (2, "zero-1")), (2, "zero-2", (2, "fsdp"))),
    ],
)
def test_a_run_goes_on_with_its_one_moment(
    saved: SavedRuns, tmp_path: Path, world_size: int, strategy: str, other: tuple[int, str]
) -> None:
    """Bit for bit on the same ranks, within rounding on others. A merge lies behind the checkpoint, one before it."""
    unbroken = saved.run(world_size, strategy, tmp_path / "a", **SAVED)
    after = {step: loss for step, loss in unbroken.items() if step > 8}
    resume = {"checkpoint.resume": str(tmp_path / "a" / "checkpoints" / "step-00000008")}
    assert saved.run(world_size, strategy, tmp_path / "b", **SAVED, **resume) == after and len(after) == 6
    assert saved.run(*other, tmp_path / "c", **SAVED, **resume) == pytest.approx(after, abs=1e-4)
