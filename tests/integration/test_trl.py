"""LoQTCallback in TRL's trainers, where TRL is installed: its own losses and reference models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from loqt_scale import LoQTCallback
from loqt_scale.layers import loqt_layers
from tests.integration.trainer_cases import CONFIG, callback_of, losses, tiny_llama

trl = pytest.importorskip("trl")
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_length": 16,
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")  # no telemetry


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Words n0 to n60."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"n{i}": i + 3 for i in range(61)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def counted(start: int, stop: int, stride: int = 1) -> str:
    return " ".join(f"n{i % 61}" for i in range(start, stop, stride))


def test_sft(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": [counted(start, start + 12) for start in range(48)]})
    trainer = trl.SFTTrainer(
        model=tiny_llama(),
        args=trl.SFTConfig(output_dir=str(tmp_path), **SETTINGS),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[LoQTCallback(CONFIG)],
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.4
    assert [report.step for report in callback_of(trainer).reports] == [0, 5]
    trainer.save_model(str(tmp_path / "end"))
    saved, row = AutoModelForCausalLM.from_pretrained(tmp_path / "end"), torch.arange(12)[None] + 3
    with torch.no_grad():
        torch.testing.assert_close(saved(row).logits, trainer.model.eval()(row).logits)


def test_dpo_compares_with_the_model_from_before(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    pairs = {"prompt": [counted(start, start + 6) + " " for start in range(48)]}
    pairs["chosen"] = [counted(start + 6, start + 10) for start in range(48)]
    pairs["rejected"] = [counted(start + 9, start + 5, -1) for start in range(48)]
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        args=trl.DPOConfig(output_dir=str(tmp_path), **SETTINGS),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer,
        callbacks=[LoQTCallback(CONFIG)],
    )
    assert not list(loqt_layers(trainer.ref_model))
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.05
    assert [report.step for report in callback_of(trainer).reports] == [0, 5]
