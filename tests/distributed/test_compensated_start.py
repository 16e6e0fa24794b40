"""`loqt.init: loftq` on any number of ranks: the start of one process, and a run that goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import RankPool
from tests.distributed.runs import Runs, SavedRuns, seldom

SHORT = {"loqt.init": "loftq", "loqt.merge.gap": 4, "train.steps": 9, "checkpoint.every": 3, "optim.warmup_steps": 2}


def start_of(rows: list[dict[str, float]]) -> dict[str, float]:
    """What the first rows say of the start: its errors and the held-out loss after it."""
    return {key: value for row in rows if row["step"] == 0 for key, value in row.items() if "/" in key}


@pytest.mark.parametrize(
    ("world_size", "strategy"),
    [
        (2, "zero-3"),
        *seldom((3, "fsdp"), (2, "ddp"), (2, "fsdp"), (2, "zero-1"), (4, "fsdp")),
    ],
)
@pytest.mark.parametrize("side", ["input", pytest.param("output", marks=pytest.mark.long)])
def test_strategies_start_alike_and_go_on_alike(runs: Runs, world_size: int, strategy: str, side: str) -> None:
    """Four ranks are two replicas (HSDP), which share out the layers."""
    settings: dict[str, Any] = {**SHORT, "loqt.side": side}
    spread = {"parallel.shard_size": 2} if world_size == 4 else {}
    reference, rows = runs.metrics(1, "single", **settings), runs.metrics(world_size, strategy, **settings, **spread)
    start, expected = start_of(rows), start_of(reference)
    assert start["start/error_after"] < 0.95 * start["start/error_before"]
    assert start["start/error_after"] == pytest.approx(expected["start/error_after"], rel=1e-3)
    assert start["eval/loss"] == pytest.approx(expected["eval/loss"], abs=1e-3)
    losses, others = ([row["train/loss"] for row in many if "train/loss" in row] for many in (rows, reference))
    assert len(losses) == 9 and losses == pytest.approx(others, abs=5e-3)


@pytest.mark.long
def test_offloading_changes_no_bit(runs: Runs) -> None:
    assert runs.losses(1, "single-all", **SHORT) == runs.losses(1, "single", **SHORT)


@pytest.mark.parametrize(
    ("world_size", "strategy"),
    [(2, "fsdp"), *seldom((1, "single"), (2, "zero-3"))],
)
def test_a_run_goes_on_bit_for_bit_and_does_not_start_again(
    ranks: RankPool,
    three_ranks: RankPool,
    tmp_path: Path,
    text_file: Path,
    cache_dir: Path,
    world_size: int,
    strategy: str,
) -> None:
    common = {"data.files": [str(text_file)], "data.cache_dir": str(cache_dir), **SHORT}
    saved = SavedRuns(ranks, three_ranks, tmp_path, {**common, "checkpoint.keep_last": 9})
    unbroken = saved.run(world_size, strategy, tmp_path / "a")
    resume = {"checkpoint.resume": str(tmp_path / "a" / "checkpoints" / "step-00000003")}
    resumed = saved.run(world_size, strategy, tmp_path / "b", **resume)
    assert resumed == {step: loss for step, loss in unbroken.items() if step > 3} and len(resumed) == 6
    assert "start/" not in (tmp_path / "b" / "metrics.jsonl").read_text()
