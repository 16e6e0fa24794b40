"""The sweep over transformers' architectures: its short form here, all of it as a long test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("gpt2", "t5", "bert", "mixtral", "vit", "mamba")


@pytest.fixture(scope="module", autouse=True)
def benchmarks_on_the_path() -> Iterator[None]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


def _try(names: set[str] | None) -> None:
    from architectures import ARCHITECTURES, try_one

    chosen = [one for one in ARCHITECTURES if (one.name in names if names else one.name not in SHORT)]
    assert len(chosen) == (len(names) if names else len(ARCHITECTURES) - len(SHORT)) and len(ARCHITECTURES) >= 40
    for architecture in chosen:
        result = try_one(architecture)
        assert result.share > 0.05 and result.layers > 1, architecture.name


def test_architectures_of_every_family_convert_train_and_go_back_dense() -> None:
    _try(set(SHORT))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_other_architectures_do_so_too() -> None:
    _try(None)
