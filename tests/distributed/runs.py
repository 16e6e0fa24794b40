"""Small jobs on ranks, whose losses tests compare: each is run once and remembered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import RankPool

TRAIN = "tests.distributed.tasks:train_run"
AT = 20  # between two merges (after steps 13 and 26)


def seldom(*cases: tuple[Any, ...]) -> list[Any]:
    """Parameters of long tests."""
    return [pytest.param(*case, marks=pytest.mark.long) for case in cases]


def strategy_settings(strategy: str) -> dict[str, Any]:
    """`zero-2` is strategy zero at stage 2, `single-base` one device with the base in host memory."""
    name, _, more = strategy.partition("-")
    key = "parallel.offload" if name == "single" else "parallel.zero_stage"
    return {"parallel.strategy": name} | ({key: more} if more else {})


class Runs:
    """Runs the small job once per setting and remembers its losses."""

    def __init__(self, ranks: RankPool, three_ranks: RankPool, folder: Path, text_file: Path, cache_dir: Path) -> None:
        self._ranks, self._three_ranks, self._folder = ranks, three_ranks, folder
        self.common = {"data.files": [str(text_file)], "data.cache_dir": str(cache_dir)}
        self._known: dict[str, list[dict[str, float]]] = {}

    def metrics(self, world_size: int, strategy: str, **settings: Any) -> list[dict[str, float]]:
        key = "-".join([strategy, str(world_size), *(f"{k}={v}" for k, v in sorted(settings.items()))])
        if key not in self._known:
            run_dir = self._folder / str(len(self._known))
            arguments = {**self.common, "train.run_dir": str(run_dir), **strategy_settings(strategy), **settings}
            pool = self._three_ranks if (world_size, strategy) == (3, "zero-3") else self._ranks
            self._known[key] = pool.run(world_size, TRAIN, **arguments)[0]
        return self._known[key]

    def losses(self, world_size: int, strategy: str, **settings: Any) -> list[float]:
        return [row["train/loss"] for row in self.metrics(world_size, strategy, **settings) if "train/loss" in row]


class SavedRuns:
    """Unbroken runs that leave checkpoints, one per strategy and world size."""

    def __init__(self, ranks: RankPool, three_ranks: RankPool, folder: Path, common: dict[str, Any]) -> None:
        self._ranks, self._three_ranks, self._folder, self._common = ranks, three_ranks, folder, common
        self._known: dict[str, dict[int, float]] = {}

    def run(self, world_size: int, strategy: str, run_dir: Path, **settings: Any) -> dict[int, float]:
        """Trains; returns all losses by step, those from before a resume in the same folder too."""
        pool = self._three_ranks if (world_size, strategy) == (3, "zero-3") else self._ranks
        arguments = {**self._common, **strategy_settings(strategy), "train.run_dir": str(run_dir), **settings}
        rows = pool.run(world_size, TRAIN, **arguments)[0]
        return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}

    def folder(self, world_size: int, strategy: str) -> Path:
        return self._folder / f"{strategy}-on-{world_size}"

    def losses(self, world_size: int, strategy: str) -> dict[int, float]:
        """Losses of the unbroken run, which saves after step AT."""
        key = f"{world_size}-{strategy}"
        if key not in self._known:
            settings = {"checkpoint.every": AT, "checkpoint.keep_last": 9, "train.eval_every": AT}
            self._known[key] = self.run(world_size, strategy, self.folder(world_size, strategy), **settings)
        return self._known[key]

    def checkpoint(self, world_size: int, strategy: str, step: int = AT) -> str:
        self.losses(world_size, strategy)
        return str(self.folder(world_size, strategy) / "checkpoints" / f"step-{step:08d}")
