"""A strategy of another package (`by_hand`): found by its name, given its options, and as good as ours."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.by_hand import install
from tests.distributed.pool import RankPool
from tests.distributed.runs import Runs

SHORT = {"train.steps": 15, "train.micro_batch_size": 2, "checkpoint.every": 0}  # two passes a step; merges at 0, 13


def test_another_packages_strategy_trains_as_ours_do(
    ranks: RankPool, runs: Runs, text_file: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """Of two ranks' gradients a sum has one value, in whatever order: equal to the last bit, through merges."""
    install(tmp_path)
    common = {"data.files": [str(text_file)], "data.cache_dir": str(cache_dir), "train.run_dir": str(tmp_path / "run")}
    settings = {**SHORT, **common, "parallel.strategy": "by_hand", "parallel.options": {"together": True}}
    rows = ranks.run(2, "tests.distributed.by_hand:train_where_installed", folder=str(tmp_path), **settings)[0]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 15 and sum("merge/seconds" in row for row in rows) == 2
    assert losses == runs.losses(2, "ddp", **SHORT)
