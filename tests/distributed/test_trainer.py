"""Trainer with LoQTCallback on two ranks trains as on one: DDP, Accelerate's FSDP2, its DeepSpeed engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import RankPool

TASK = "tests.distributed.trainer_tasks:train"
STEPS = 6  # merges follow steps 0 and 5


@pytest.fixture(scope="module")
def one(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process, the same rows in each step, nothing packed: all sums are exact but for their order."""
    folder = str(tmp_path_factory.mktemp("one"))
    return ranks.run(1, TASK, folder=folder, spread="plain", scheme="none", max_steps=STEPS)[0]


def check(ranks: RankPool, one: dict[str, Any], folder: Path, spread: str) -> None:
    found = ranks.run(2, TASK, folder=str(folder), spread=spread, scheme="none", max_steps=STEPS)
    assert all(each["losses"] == pytest.approx(one["losses"], abs=2e-5) for each in found)
    assert found[0]["merges"] == one["merges"] == [0, 5]
    assert found[0]["saved"] == pytest.approx(one["saved"], abs=2e-5)


def test_ddp(ranks: RankPool, one: dict[str, Any], tmp_path: Path) -> None:
    check(ranks, one, tmp_path, "ddp")


SLOW = ["fsdp-lone", "fsdp-frugal", "zero3"]


@pytest.mark.parametrize("spread", ["fsdp", "zero2", *(pytest.param(each, marks=pytest.mark.long) for each in SLOW)])
def test_sharded(spread: str, ranks: RankPool, one: dict[str, Any], tmp_path: Path) -> None:
    check(ranks, one, tmp_path, spread)


@pytest.mark.long
@pytest.mark.parametrize("spread", ["ddp", "fsdp", "fsdp-sharded", "zero3"])
def test_goes_on_packed(spread: str, ranks: RankPool, tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 3, "max_steps": STEPS}
    whole = ranks.run(2, TASK, folder=str(tmp_path), spread=spread, scheme="nf4", **saves)[0]
    checkpoint = str(tmp_path / "checkpoint-3")
    rest = ranks.run(2, TASK, folder=str(tmp_path), spread=spread, scheme="nf4", resume=checkpoint, max_steps=STEPS)[0]
    assert rest["losses"] == whole["losses"] and rest["merges"] == [5]
