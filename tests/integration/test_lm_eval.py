"""EleutherAI's harness on an exported model, with local tasks, as docs/export.md has it. Skipped without lm-eval."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from loqt_scale.cli import main

pytest.importorskip("lm_eval")

SENTENCES = ["import os, then import sys. " * 3, "The file is read line by line."]
CHOICES = {
    "task": "choices",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}
TEXT = {
    "task": "text",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}


def test_an_exported_model_takes_local_tasks(text_file: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Bits per byte are those of the model's own log-likelihoods; a choice is the likelier one."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    words = [f"--data.files={text_file}", f"--data.cache_dir={cache_dir}", f"--train.run_dir={tmp_path / 'run'}"]
    words += ["--model.preset=llama_nano", "--data.seq_len=256", "--loqt.rank=8", "--train.steps=4"]
    words += ["--train.global_batch_size=2", "--train.micro_batch_size=2", "--train.device=cpu"]
    assert main(["train", *words]) == 0
    folder = tmp_path / "model"
    assert main(["export", "--checkpoint", str(tmp_path / "run"), "--out", str(folder), "--dtype", "float32"]) == 0
    rows = {
        "choices": [{"question": "import", "choices": [" os", "\x00\x01\x02\x03\x04\x05"], "answer": 0}],
        "text": [{"text": text} for text in SENTENCES],
    }
    for task in (CHOICES, TEXT):
        lines = tmp_path / f"{task['task']}.jsonl"
        lines.write_text("".join(json.dumps(row) + "\n" for row in rows[str(task["task"])]))
        task = {**task, "dataset_kwargs": {"data_files": {"test": str(lines)}}}
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(task))
    found = simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder},max_length=256",
        tasks=["choices", "text"],
        task_manager=TaskManager(include_path=str(tmp_path)),
        device="cpu",
    )["results"]
    assert found["choices"]["acc,none"] == 1.0
    assert found["text"]["bits_per_byte,none"] == pytest.approx(bits_per_byte(folder), rel=1e-4)


def bits_per_byte(folder: Path) -> float:
    """Of the sentences, each after an end of text, byte by byte."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    nats, size = 0.0, 0
    for text in SENTENCES:
        ids = torch.tensor([[256, *text.encode()]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        nats += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        size += len(text.encode())
    return nats / math.log(2) / size
