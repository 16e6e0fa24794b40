"""Fixtures of tests that compare runs: what has been run is shared by a file's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.pool import RankPool
from tests.distributed.runs import Runs, SavedRuns


@pytest.fixture(scope="module")
def runs(
    ranks: RankPool, three_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, text_file: Path, cache_dir: Path
) -> Runs:
    """Unbroken runs by their settings."""
    return Runs(ranks, three_ranks, tmp_path_factory.mktemp("runs"), text_file, cache_dir)


@pytest.fixture(scope="module")
def saved(
    ranks: RankPool, three_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, text_file: Path, cache_dir: Path
) -> SavedRuns:
    """Runs that save, and what they have saved."""
    common = {"data.files": [str(text_file)], "data.cache_dir": str(cache_dir)}
    return SavedRuns(ranks, three_ranks, tmp_path_factory.mktemp("saved"), common)
