"""Ranks that read other text or another tokenizer, a stale copy on one node, do not train; what all see one tells."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2MoeConfig

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


def test_what_all_ranks_warn_of_is_said_by_one(
    ranks: RankPool, text_file: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """That a model's logits cannot be taken by chunks, say."""
    Qwen2MoeConfig(
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
    ).save_pretrained(tmp_path / "model")
    words = {"model.path": str(tmp_path / "model"), "model.loss_chunk_tokens": 8, "parallel.strategy": "ddp"}
    run_in = {"data.files": [str(text_file)], "data.cache_dir": str(cache_dir), "train.run_dir": str(tmp_path / "run")}
    short = {"train.steps": 1, "optim.warmup_steps": 0, "model.overrides": {}}
    first, second = ranks.run(2, "tests.distributed.tasks:warnings_of_run", **words, **run_in, **short)
    assert sum("model.loss_chunk_tokens is 8, but it is not known" in text for text in first) == 1
    assert not any("model.loss_chunk_tokens" in text for text in second)
