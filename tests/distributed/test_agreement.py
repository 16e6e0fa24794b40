"""Ranks that read other text or another tokenizer, a stale copy on one node, do not train."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import RankPool

RUN: dict[str, Any] = {"data.files": ["text.txt"], "train.steps": 2, "optim.warmup_steps": 0, "model.overrides": {}}
TASK = "tests.distributed.tasks:run_on_own_copy"


@pytest.fixture
def copies(tmp_path: Path, text_file: Path) -> Path:
    """Two working directories with the same text, of different age."""
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        (tmp_path / rank / "text.txt").write_bytes(text_file.read_bytes())
    os.utime(tmp_path / "1" / "text.txt", (1, 1))
    return tmp_path


def run(ranks: RankPool, copies: Path, **more: Any) -> list[str]:
    settings = {**RUN, "data.cache_dir": str(copies / "cache"), "train.run_dir": str(copies / "run"), **more}
    return ranks.run(2, TASK, folder=str(copies), **settings)


def test_the_same_text_at_another_place_trains(ranks: RankPool, copies: Path) -> None:
    assert run(ranks, copies) == ["nothing", "nothing"]


@pytest.mark.parametrize("what", ["training", "held-out"])
def test_a_stale_copy_on_one_rank_is_refused_before_the_run_folder_is_made(
    ranks: RankPool, copies: Path, what: str
) -> None:
    path = copies / "1" / "text.txt"
    if what == "training":
        path.write_bytes(path.read_bytes().replace(b"statement", b"Statement"))
        ended = run(ranks, copies)
    else:  # a stream, of which only the held-out part is known at the start
        for rank, text in (("0", "one"), ("1", "two")):
            for split, words in (("train", "same"), ("validation", text)):
                (copies / rank / "set").mkdir(exist_ok=True)
                (copies / rank / "set" / f"{split}.jsonl").write_text(f'{{"text": "{words} text"}}\n' * 40)
        ended = run(ranks, copies, **{"data.files": [], "data.dataset": "set"})
    assert ended[0] == ended[1] and ended[0].startswith("UserError: rank 0 has "), ended
    assert "digest" in ended[0] and "rank 1 has" in ended[0] and "copies of the text" in ended[0]
    assert not (copies / "run").exists()
