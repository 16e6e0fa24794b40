"""What `eval` and `generate` refuse before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from loqt_scale.config import DataConfig, LoQTConfig, RunConfig, TrainConfig
from loqt_scale.config.yaml import save_run_config
from loqt_scale.errors import ConfigError, UserError
from loqt_scale.inference import evaluate_saved, generate
from loqt_scale.inference.generation import _check_tokens
from loqt_scale.inference.saved_model import RUN_SETTINGS


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A folder as an export leaves it, of a run of rank 5, but for weights and tokenizer."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config = RunConfig(loqt=LoQTConfig(rank=5), data=DataConfig(tokenizer="/gone"), train=TrainConfig(seed=4))
    save_run_config(config, tmp_path / RUN_SETTINGS)
    return tmp_path


def changed(group: str, **values: Any) -> Callable[[RunConfig], RunConfig]:
    return lambda config: replace(config, **{group: replace(getattr(config, group), **values)})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (changed("loqt", rank=4), r"loqt\.rank is the model's and stays 5; eval takes data\., parallel\."),
        (changed("train", seed=5), r"train\.seed is the model's and stays 4"),
        (changed("model", path="/elsewhere"), r"model\.path is the model's and stays '.+'"),
        (changed("data", tokenizer="bytes"), r"data\.tokenizer is the model's and stays '.+'"),
        (changed("parallel", strategy="zero"), r"parallel\.strategy is 'zero', which only trains; write fsdp, ddp"),
    ],
)
def test_what_belongs_to_the_model_stays(exported: Path, override: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate_saved(str(exported), override)


def test_the_same_tokenizer_spelled_otherwise_is_no_change(exported: Path) -> None:
    """All is well up to the tokenizer itself, which is not there."""
    override = changed("data", tokenizer=f"{exported}/../{exported.name}")
    with pytest.raises(UserError, match="AutoTokenizer cannot load"):
        evaluate_saved(str(exported), override)


def test_one_process_scores_a_folder_and_generates(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="is a Hugging Face model, which one process scores, not 3"):
        evaluate_saved(str(exported))
    with pytest.raises(ConfigError, match="generate runs in one process"):
        generate(exported)


@pytest.mark.parametrize(
    ("ids", "new", "message"),
    [
        ([None], 1, "the tokenizer in files has no end of text to start from; write --prompt TEXT"),
        ([3, 10, 2], 1, "gives the token 10, but the model knows 10"),
        ([1, 2, 3], 6, "the prompt's 3 tokens and max_new_tokens 6 are more than the model's 8 positions"),
        ([1, 2, 3], 5, None),
    ],
)
def test_tokens_that_the_model_cannot_take(ids: list[int | None], new: int, message: str | None) -> None:
    config = LlamaConfig(vocab_size=10, max_position_embeddings=8)
    if message is None:
        _check_tokens(ids, config, Path("files"), new)
        return
    with pytest.raises(UserError, match=message):
        _check_tokens(ids, config, Path("files"), new)
