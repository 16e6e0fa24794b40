"""Passages of Python's standard library, to be told apart by package: a CSV that is made where Python is installed."""

import csv
import random
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PACKAGES = ["asyncio", "email", "unittest", "multiprocessing", "importlib", "xml"]
TOKENS, LINES = 24, 2


def make_csv(file: Path, held_out: bool) -> None:
    """(passage, package): two lines each, every fifth file of a package held out; as many of each package."""
    library = Path(sysconfig.get_path("stdlib"))
    with file.open("w", newline="") as out:
        for label, package in enumerate(PACKAGES):
            passages = []
            for index, source in enumerate(sorted((library / package).rglob("*.py"))):
                lines = [line.strip() for line in source.read_text(errors="ignore").splitlines() if len(line) > 8]
                if (index % 5 == 0) == held_out:
                    passages += ["\n".join(lines[at : at + LINES]) for at in range(0, len(lines) - LINES, LINES)]
            random.Random(0).shuffle(passages)
            csv.writer(out).writerows((passage, label) for passage in passages[: 60 if held_out else 800])


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, special_tokens=["[PAD]", "[UNK]"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


class Passages(torch.utils.data.Dataset):
    def __init__(self, rows: list[tuple[str, int]], tokenizer) -> None:
        texts = [text for text, _ in rows]
        cut = {"truncation": True, "max_length": TOKENS, "padding": "max_length", "return_tensors": "pt"}
        self.tokens, self.labels = tokenizer(texts, **cut), torch.tensor([int(label) for _, label in rows])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: self.tokens[key][index] for key in ("input_ids", "attention_mask")} | {
            "labels": self.labels[index]
        }
