"""Fixtures for all tests: one thread per process, one pool of ranks per session, one small corpus."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.distributed.pool import RankPool

settings.register_profile("loqt_scale", deadline=None, derandomize=True)
settings.load_profile("loqt_scale")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Rank processes, shared by all tests of the session."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def three_ranks() -> Iterator[RankPool]:
    """Rank processes for ZeRO stage 3 on 3 ranks only.

    DeepSpeed compares serial numbers of modules over ranks, and a process numbers on from one run to the next: ranks
    must have run the same things before.
    """
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus of real English, from the Python that runs the tests."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("corpus") / "topics.txt"
    path.write_text("\n\n".join(" ".join(text.split()) for text in sorted(topics.values())[:60]), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenized corpora of the session."""
    return tmp_path_factory.mktemp("cache")
