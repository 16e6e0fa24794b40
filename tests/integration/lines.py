"""Real runs, one after another in one folder: what the tests of a run's start have in common."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loqt_scale.checkpoint import Start
from loqt_scale.config import RunConfig
from loqt_scale.strategies import SingleComm
from loqt_scale.training.job import train
from loqt_scale.training.opening import OpenRun

STEPS = 6
FINISHED = "finished after"
LONG = pytest.mark.long


class Runs:
    """Runs with the settings of all of these tests."""

    def __init__(self, common: RunConfig, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.common, self.folder, self._capture = common, folder, capture

    def _config(self, name: str, settings: dict[str, Any]) -> RunConfig:
        config = self.common
        for key, value in {"train__run_dir": str(self.folder / name), **settings}.items():
            config = replaced(config, key.split("__"), value)
        return config

    def __call__(self, name: str = "run", **settings: Any) -> str:
        """One job in a folder; returns what it said. Dots of setting names are written as two underscores."""
        self._capture.readouterr()
        train(self._config(name, settings))
        return self._capture.readouterr().out

    def prepare(self, name: str = "run", **settings: Any) -> Start:
        """All that a job does to its folder before it trains; nothing is trained."""
        with OpenRun(self._config(name, settings), SingleComm(torch.device("cpu")), tell=lambda line: None) as run:
            if run.start.finished is None:
                run.prepare()
            return run.start

    def checkpoint(self, step: int, name: str = "run") -> Path:
        return self.folder / name / "checkpoints" / f"step-{step:08d}"

    def saved(self, name: str = "run") -> list[int]:
        found = (self.folder / name / "checkpoints").glob("step-*")
        return sorted(int(path.name.removeprefix("step-")) for path in found)

    def latest(self, name: str = "run") -> str:
        return (self.folder / name / "checkpoints" / "latest").read_text().strip()

    def rows(self, name: str = "run") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def losses(self, name: str = "run") -> dict[int, float]:
        rows = [row for row in self.rows(name) if "train/loss" in row]
        assert len({row["step"] for row in rows}) == len(rows), "a step is there twice"
        return {row["step"]: row["train/loss"] for row in rows}


def replaced(settings: Any, names: list[str], value: Any) -> Any:
    """Settings with one of them replaced, which lies below these groups (parsing takes longer than a test may)."""
    inner = value if len(names) == 1 else replaced(getattr(settings, names[0]), names[1:], value)
    return replace(settings, **{names[0]: inner})


class Killed(BaseException):
    """What a kill is to a test that goes on: nothing of ours catches it."""


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
