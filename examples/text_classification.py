"""Trainer on text classification: which package of Python's standard library is a passage from?

A DeBERTa-shaped model, from scratch, on a CSV that this script makes of the library's own files (other files are held
out). With `--glue sst2` (and a hub that can be reached): microsoft/deberta-v3-base on that task of GLUE instead.
`LoQTCallback` is the one line that LoQT takes.
"""

import argparse
import csv
from pathlib import Path

import torch
from compare import Result, compare, measured
from passages import PACKAGES, Passages, make_csv, make_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from loqt_scale import LoQTCallback, LoQTConfig, MergeConfig

CONFIG = LoQTConfig(rank=48, merge=MergeConfig(gap=25))


def load(glue: str | None, folder: Path):
    """(model without its weights, training rows, held-out rows)."""
    if glue:
        from datasets import load_dataset

        name, rows = "microsoft/deberta-v3-base", load_dataset("nyu-mll/glue", glue)
        model = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=rows["train"].features["label"].num_classes
        )
        sets = [[(row["sentence"], row["label"]) for row in rows[split]] for split in ("train", "validation")]
        tokenizer = AutoTokenizer.from_pretrained(name)
        return model, *(Passages(split, tokenizer) for split in sets)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"library-{part}.csv" for part in ("train", "held-out")]
    for held_out, file in enumerate(files):
        make_csv(file, bool(held_out))
    sets = [list(csv.reader(file.open(newline=""))) for file in files]
    tokenizer = make_tokenizer([text for text, _ in sets[0]])
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    shape["initializer_range"] = OPTIONS.spread
    kind = DebertaV2Config(vocab_size=len(tokenizer), num_labels=len(PACKAGES), pad_token_id=0, **shape, **relative)
    return DebertaV2ForSequenceClassification(kind), *(Passages(split, tokenizer) for split in sets)


def train(method: str, seed: int, rate: float, short: bool) -> Result:
    torch.manual_seed(seed)
    model, training, held_out = load(OPTIONS.glue, Path("runs/examples"))
    args = TrainingArguments(
        "runs/examples/trainer", per_device_train_batch_size=16, max_steps=4 if short else 200, learning_rate=rate,
        seed=seed, lr_scheduler_type="cosine", warmup_steps=20, logging_steps=1 if short else 20, save_strategy="no",
        report_to=[], disable_tqdm=True, per_device_eval_batch_size=256,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=args, train_dataset=training, eval_dataset=held_out,
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
        callbacks=[LoQTCallback(CONFIG)] if method == "loqt" else [],
    )  # fmt: skip
    trainer.train()
    curve = [(line["step"], line["loss"]) for line in trainer.state.log_history if "loss" in line]
    return measured(100 * trainer.evaluate()["eval_accuracy"], curve, trainer.model, trainer.optimizer)


parser = argparse.ArgumentParser(add_help=False)
parser.add_argument("--glue", help="a task of GLUE with one sentence: sst2, cola")
parser.add_argument("--spread", type=float, default=0.1, help="of the initial weights; transformers' 0.02 is for wider")
OPTIONS, _ = parser.parse_known_args()
if __name__ == "__main__":
    rates = {"loqt": [5e-3, 2.5e-3, 1e-2, 2e-2], "full": [4e-3, 2e-3, 8e-3, 1.6e-2]}
    compare(train, name="text_classification", score="held-out accuracy, %", curve="training loss", rates=rates)
