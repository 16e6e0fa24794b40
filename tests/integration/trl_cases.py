"""TRL's trainers of a tiny model, on one process or as one rank of several."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from loqt_scale import LoQTCallback
from tests.distributed.trainer_tasks import config_of, one_accelerator, settings_of
from tests.integration.trainer_cases import CONFIG, callback_of, losses, tiny_llama

ROWS = 4  # of a pass, on all ranks together
SETTINGS: dict[str, Any] = {
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


def make_trainer(kind: str, folder: Path, config: Any = CONFIG, **changes: Any) -> Any:
    """The trainer of a kind, sft or dpo. Every rank."""
    rows = ROWS // int(os.environ.get("WORLD_SIZE", "1"))
    settings = {"output_dir": str(folder), "per_device_train_batch_size": rows, **SETTINGS, **changes}
    common: dict[str, Any] = {"processing_class": _tokenizer(), "callbacks": [LoQTCallback(config)]}
    if kind == "sft":
        texts = Dataset.from_dict({"text": [_counted(start, start + 12) for start in range(48)]})
        return trl.SFTTrainer(model=tiny_llama(), args=trl.SFTConfig(**settings), train_dataset=texts, **common)
    base = folder / f"base-{os.environ.get('RANK', '0')}"  # of which TRL loads a reference
    tiny_llama().save_pretrained(base)
    pairs = {"prompt": [_counted(start, start + 6) + " " for start in range(48)]}
    pairs["chosen"] = [_counted(start + 6, start + 10) for start in range(48)]
    pairs["rejected"] = [_counted(start + 9, start + 5, -1) for start in range(48)]
    model = AutoModelForCausalLM.from_pretrained(base)
    return trl.DPOTrainer(model=model, args=trl.DPOConfig(**settings), train_dataset=Dataset.from_dict(pairs), **common)


def trained_losses(kind: str, folder: str, spread: str) -> dict[str, Any]:
    """Losses and merge steps of a run without quantization, spread as in `settings_of`. Every rank."""
    os.environ["CI"] = "1"  # no telemetry
    with one_accelerator(spread):
        trainer = make_trainer(kind, Path(folder), config_of("none"), **settings_of(spread))
        trainer.train()
        return {"losses": losses(trainer), "merges": [report.step for report in callback_of(trainer).reports]}


def _tokenizer() -> PreTrainedTokenizerFast:
    """Words n0 to n60."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"n{i}": i + 3 for i in range(61)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def _counted(start: int, stop: int, stride: int = 1) -> str:
    return " ".join(f"n{i % 61}" for i in range(start, stop, stride))
