"""The device of these tests.

They are collected where there is a CUDA device only. `LOQT_TEST_DEVICE=cpu` runs them on the CPU:
then each compares the CPU with itself, which shows that the tests are right, not that CUDA is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loqt_scale.config import RunConfig
from loqt_scale.strategies import resolve_device
from tests.distributed.tasks import small_config

TEST_DEVICE = os.environ.get("LOQT_TEST_DEVICE", "cuda")
collect_ignore_glob = [] if TEST_DEVICE == "cpu" or torch.cuda.is_available() else ["*"]
Settings = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """What is tested against the CPU."""
    return resolve_device(TEST_DEVICE)


@pytest.fixture
def settings(tmp_path: Path, text_file: Path, cache_dir: Path) -> Settings:
    """The equivalence tests' small run, on one device, with settings replaced."""
    common = {"data.files": [str(text_file)], "data.cache_dir": str(cache_dir), "train.run_dir": str(tmp_path)}

    def make(**changed: Any) -> RunConfig:
        return small_config({**common, "parallel.strategy": "single", **changed})

    return make
