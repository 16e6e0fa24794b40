"""What Muon costs beside AdamW: states, an update's share of a step's time, bytes on the wire; LLaMA 60M, on the CPU.

States are read off the tensors, times are of alternating steps, bytes are counted at the collectives of two ranks under
FSDP2. (On a GPU: `python benchmarks/gpu.py --part optimizers`.)

    python benchmarks/optimizers.py
    python benchmarks/optimizers.py --quick       # a small shape, to see that it runs
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, publish, table
from step_time import measured_in_turns

sys.path.insert(0, str(ROOT))

from loqt_scale.config.yaml import parse_run_config
from loqt_scale.metrics.wire_counter import WireCounter
from loqt_scale.training.trainer import Trainer
from tests.distributed.footprint_tasks import kinds_held, make_trainer
from tests.distributed.pool import RankPool

SMALL = ["--optim.states=int8", "--model.dtype=bfloat16", "--model.trained_dtype=bfloat16"]
VARIANTS: dict[str, list[str]] = {
    "AdamW": [],
    "Muon": ["--optim.name=muon"],
    "AdamW, int8 states, bfloat16 factors": SMALL,
    "Muon, int8 states, bfloat16 factors": ["--optim.name=muon", *SMALL],
    "AdamW, int8 states, bfloat16 factors, compiled": [*SMALL, "--optim.compile=true"],
    "Muon, int8 states, bfloat16 factors, compiled": ["--optim.name=muon", *SMALL, "--optim.compile=true"],
}
SEQUENCES, SEQ_LEN = 8, 256
HEADER = ["optimizer", "moments, MiB", "/ AdamW's", "update, ms", "of a step's time", "sent a step, MiB", "/ AdamW's"]


def measure_wire(words: list[str]) -> int:
    """Bytes that this rank sends in a normal step in a ring. Every rank."""
    trainer = make_trainer(parse_run_config(words))
    trainer.step(0)
    with WireCounter() as step:
        trainer.step(1)
    return step.sent_bytes()


def timed_step(trainer: Trainer, step: int) -> tuple[float, float]:
    """Seconds of a normal step's passes and of its update."""
    began = time.perf_counter()
    trainer.accumulate(step)
    passed = time.perf_counter()
    trainer.update()
    return passed - began, time.perf_counter() - passed


def measure(preset: str, words: list[str], repeats: int) -> list[list[Any]]:
    """One row a variant."""
    trainers: dict[str, Trainer] = {}
    sent, pool = {}, RankPool()
    for name, own in VARIANTS.items():
        trainers[name] = make_trainer(parse_run_config([*words, "--parallel.strategy=single", *own]))
        trainers[name].step(0)  # a merge: before it B has no gradient
        trainers[name].finish_pending()
        trainers[name].step(1)
        sent[name] = pool.run(2, "optimizers:measure_wire", words=[*words, "--parallel.strategy=fsdp", *own])[0]
    pool.close()
    times = measured_in_turns(list(VARIANTS), repeats, lambda name, turn: timed_step(trainers[name], 2 + turn))
    held = {name: kinds_held(trainer)["adam"] for name, trainer in trainers.items()}
    first, rows = next(iter(VARIANTS)), []
    for name in VARIANTS:
        update = statistics.median(update for _, update in times[name])
        share = statistics.median(update / (passes + update) for passes, update in times[name])
        row: list[Any] = [name, f"{held[name] / 2**20:.1f}", f"{held[name] / held[first]:.2f}", f"{1000 * update:.0f}"]
        rows.append([*row, f"{share:.1%}", f"{sent[name] / 2**20:.1f}", f"{sent[name] / sent[first]:.2f}"])
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape; does not touch RESULTS.md")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    preset, rank = ("llama_micro", 32) if options.quick else ("llama_60m", 128)
    with tempfile.TemporaryDirectory() as folder:
        words = [f"--model.preset={preset}", f"--loqt.rank={rank}", f"--data.seq_len={SEQ_LEN}", "--train.steps=999"]
        words += ["--data.tokenizer=bytes", "--data.max_eval_sequences=2", "--train.progress=off"]
        words += [f"--train.run_dir={Path(folder) / 'run'}", "--loqt.merge.gap=500"]
        words += [f"--train.global_batch_size={SEQUENCES}", f"--train.micro_batch_size={SEQUENCES}"]
        rows = measure(preset, words, options.repeats)
    text = (
        f"{table(HEADER, rows)}\n\n{preset}, rank {rank}, byte vocabulary (320), {SEQUENCES} x {SEQ_LEN} tokens a step "
        f"in one pass, one thread, {options.repeats} rounds in turns, medians. `sent`: by one of two ranks under fsdp; "
        "Muon's own message is an upper triangle in float64 for each layer, whatever the batch. Of the paper's 131072 "
        "tokens a step an update's share is a 64th of these figures."
    )
    publish("What Muon costs beside AdamW", "python benchmarks/optimizers.py", text, keep=not options.quick)


if __name__ == "__main__":
    main()
