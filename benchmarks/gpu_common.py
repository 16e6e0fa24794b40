"""What the parts of benchmarks/gpu.py share: where they run, their models, a clock that waits for the device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from common import ROOT
from torch import Tensor

from loqt_scale.config.yaml import parse_run_config
from loqt_scale.functional.seeding import stable_seed
from loqt_scale.model.weights import WeightSource
from loqt_scale.training.trainer import Trainer
from tests.distributed.footprint_tasks import make_trainer

Result = TypeVar("Result")
Table = tuple[str, str]  # heading, Markdown
RANKS = {  # the papers'; beyond 1b ours
    "llama_micro": 32,
    "llama_130m": 256,
    "llama_350m": 256,
    "llama_1b": 512,
    "llama_7b": 1024,
    "llama_13b": 1024,
}
STEP_TOKENS = 131072  # the papers' batch: 512 sequences of 256 tokens
# dense bfloat16 FLOPs a second by name, the makers' figures without sparsity; the first that the name contains
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


@dataclass(frozen=True)
class Place:
    """Where, and how large.

    Args:
        device: Where models compute.
        quick: Tiny shapes, to see that everything runs.
        folder: For run folders.
        chosen: Shapes to measure; empty: all that a part has.
        compiled_only: Whether only compiled blocks of full-rank training and LoQT are timed.
    """

    device: torch.device
    quick: bool
    folder: Path
    chosen: tuple[str, ...] = ()
    compiled_only: bool = False

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU to wait for."""
        return self.device.type == "cuda"

    @property
    def vocabulary(self) -> int:
        """Rows of embedding and head."""
        return 512 if self.quick else 32000

    @property
    def seq_len(self) -> int:
        """Tokens of a sequence."""
        return 64 if self.quick else 256

    @property
    def batch(self) -> int:
        """Sequences of a step of `STEP_TOKENS`."""
        return STEP_TOKENS // self.seq_len

    def presets(self, *names: str) -> list[str]:
        """The shapes that a part has and that were chosen, or one tiny one."""
        return ["llama_micro"] if self.quick else [name for name in names if name in (self.chosen or names)]

    def title(self, what: str) -> str:
        """The heading of a part's table: one of chosen shapes only does not replace that of all."""
        return ", ".join([what, *self.chosen, *(["compiled"] if self.compiled_only else [])])

    def wait(self) -> None:
        """Until the device has done all that it was told."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Wall time of a call, until the device has done it."""
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - started

    def words(self, preset: str, *more: str) -> list[str]:
        """Settings of a run of this shape, in bfloat16; `more` wins."""
        words = [f"--model.preset={preset}", f'--model.overrides={{"vocab_size": {self.vocabulary}}}']
        words += ["--model.dtype=bfloat16", f"--loqt.rank={RANKS[preset]}", "--data.tokenizer=bytes"]
        words += [f"--data.seq_len={self.seq_len}", "--data.max_eval_sequences=2", "--train.steps=1000"]
        words += [f"--train.global_batch_size={self.batch}", "--parallel.strategy=single", "--optim.lr=1e-3"]
        words += [f"--train.run_dir={self.folder / 'run'}", "--train.progress=off"]
        return [*words, *more]

    def trainer(self, preset: str, *more: str) -> Trainer:
        """A trainer with weights drawn on the device, whose steps are one small pass until it is resized."""
        config = parse_run_config(self.words(preset, *more))
        trainer = make_trainer(config, self.device, lambda own: DeviceWeights(own, self.device))
        resize(trainer, sequences=2, passes=1)
        return trainer

    def notes(self) -> str:
        """What every table has in common."""
        return (
            f"Sequences of {self.seq_len} tokens, bfloat16, vocabulary {self.vocabulary}; the text is the embedded "
            "corpus as bytes, so of the vocabulary's rows 320 are read (speed and memory do not depend on which)."
        )


class DeviceWeights:
    """Initial weights drawn on the device: for speed and memory, where the values do not matter.

    The product draws them on the host, the same on any machine: 35 million a second and core, 13b in minutes.

    Args:
        own: The run's source; it has the shapes, and what is no matrix.
        device: Where to draw.
    """

    ROWS = 128  # a random stream each

    def __init__(self, own: WeightSource, device: torch.device) -> None:
        self._own, self._device = own, device

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `WeightSource.rows`, but on the device."""
        shape = self._own.rows(name, start, start).shape[1:]
        if not shape:
            return self._own.rows(name, start, stop)
        out = torch.empty(stop - start, *shape, device=self._device)
        for chunk in range(start // self.ROWS, -(-stop // self.ROWS)):
            generator = torch.Generator(self._device).manual_seed(stable_seed(name, chunk))
            drawn = torch.randn(self.ROWS, *shape, generator=generator, device=self._device).mul_(0.02)
            first = chunk * self.ROWS
            low, high = max(first, start), min(first + self.ROWS, stop)
            out[low - start : high - start] = drawn[low - first : high - first]
        return out


def resize(trainer: Trainer, *, sequences: int, passes: int) -> None:
    """Has a trainer's steps be so many passes of so many sequences."""
    train = replace(trainer.config.train, micro_batch_size=sequences, global_batch_size=sequences * passes)
    trainer.config = replace(trainer.config, train=train)


def largest_pass(place: Place, steps: list[tuple[Trainer, Callable[[], object]]]) -> int:
    """The largest power of two of sequences that fits in a pass of all of these; up to 128, by trying.

    Args:
        place: Where.
        steps: Trainers, and how each is updated.
    """
    sequences = 4 if place.quick else 128
    while sequences > 1:
        try:
            for trainer, update in steps:
                resize(trainer, sequences=sequences, passes=1)
                trainer.accumulate(900)
                update()
            place.wait()
            return sequences
        except torch.OutOfMemoryError:
            for trainer, _ in steps:
                trainer.optimizer.zero_grad(set_to_none=True)
            sequences //= 2
        free(place)
    return sequences


def for_each(place: Place, presets: list[str], measure: Callable[[str], Result]) -> Iterator[dict[str, Result]]:
    """What has been measured so far, after each shape; one that does not fit on the device is left out, and said."""
    found: dict[str, Result] = {}
    for preset in presets:
        try:
            found[preset] = measure(preset)
            yield found
        except torch.OutOfMemoryError:
            print(f"{preset} does not fit on this device: no row for it", flush=True)
        free(place)


def free(place: Place) -> None:
    """Gives back what nobody holds any more."""
    gc.collect()
    if place.cuda:
        torch.cuda.empty_cache()


def gpu_peak(place: Place) -> float | None:
    """The device's dense bfloat16 FLOPs a second, if known."""
    name = torch.cuda.get_device_name(place.device) if place.cuda else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def gibibytes(size: float) -> str:
    """GiB with two digits."""
    return f"{size / 2**30:.2f}"


__all__ = [
    "PEAKS",
    "RANKS",
    "ROOT",
    "STEP_TOKENS",
    "DeviceWeights",
    "Place",
    "Table",
    "for_each",
    "free",
    "gibibytes",
    "gpu_peak",
    "largest_pass",
    "resize",
]
