"""`data.mask_documents`: what a step costs with it, and how well a model learns with and without.

    python benchmarks/documents.py [--device cuda] [--preset llama_60m] [--files docs.txt] [--publish]
    python benchmarks/documents.py --quality --files docs.txt --seeds 0 1 2 [--results benchmarks/documents.jsonl]
    python benchmarks/documents.py --table [--publish]         # of what is in the results file

Cost: two trainers in one process take turns, A B B A; a step is the product's, without merges. Quality: LoQT (rank 3/4
of the width, Muon) on the same tokens in the same order; each model is scored on the held-out text with and without
masks, whichever way it was trained, since a masked score has less to read. A run that is in the results file is not
done again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from common import ROOT, publish, table
from step_time import in_turns

from loqt_scale.config import RunConfig
from loqt_scale.config.yaml import parse_run_config
from loqt_scale.model.documents import attend
from loqt_scale.strategies import resolve_device
from loqt_scale.training.trainer import Trainer
from tests.distributed.footprint_tasks import make_trainer

MODES = ("off", "on")
STEPS = 1100  # of a run for quality
LOQT = ("--loqt.rank=48", "--optim.name=muon", "--optim.momentum=0.9", "--optim.lr=1e-2", "--optim.warmup_fraction=0.1")


def config_of(mode: str, seq_len: int, sequences: int, folder: str, *more: str) -> RunConfig:
    """A run of one process, with or without masks."""
    words = [f"--data.mask_documents={'true' if mode == 'on' else 'false'}", f"--data.seq_len={seq_len}"]
    words += [f"--train.global_batch_size={sequences}", f"--train.micro_batch_size={sequences}"]
    words += ["--parallel.strategy=single", f"--train.run_dir={folder}", "--train.progress=off", *more]
    return parse_run_config(words)


def cost(options: argparse.Namespace) -> None:
    """Prints the table of step times."""
    rows = []
    device = resolve_device(options.device)
    more = [f"--model.preset={options.preset}", f"--model.dtype={options.dtype}", "--loqt.rank=32"]
    more += [
        "--data.max_eval_sequences=2",
        "--train.steps=1000",
        "--loqt.merge.gap=900",
        f"--train.device={device.type}",
        *(f"--data.files+={file}" for file in options.files),
    ]
    for seq_len in options.seq_lens:
        with tempfile.TemporaryDirectory() as folder:
            trainers = {
                mode: make_trainer(config_of(mode, seq_len, options.tokens // seq_len, folder, *more), device)
                for mode in MODES
            }
            taken = in_turns(MODES, options.repeats + 2, partial(timed_step, trainers))
        off, on = (times[2:] for times in taken.values())  # the first ones warm up
        ratio = statistics.median(masked / plain for plain, masked in zip(off, on, strict=True))
        rows.append(
            [seq_len, f"{1000 * statistics.median(off):.0f}", f"{1000 * statistics.median(on):.0f}", f"{ratio:.3f}"]
        )
    text = table(["tokens a sequence", "ms off", "ms on", "on / off"], rows)
    named = ", ".join(Path(file).name for file in options.files) or "embedded corpus (18,000 bytes a document)"
    text += (
        f"\n\n{options.preset}, {options.tokens} tokens a step, {options.dtype}, medians of {options.repeats} pairs; "
    )
    text += f"{named}."
    command = f"python benchmarks/documents.py --preset {options.preset} --device {device.type} --dtype {options.dtype}"
    publish(f"Masked documents: a step ({device.type})", command, text, keep=options.publish)


def timed_step(trainers: Mapping[str, Trainer], mode: str, turn: int) -> None:
    """A step from reading to update, waited for."""
    trainer = trainers[mode]
    trainer.accumulate(900 + turn)
    trainer.update()
    if trainer.strategy.comm.device.type == "cuda":
        torch.cuda.synchronize()


def quality(options: argparse.Namespace) -> None:
    """Does the runs that the results file lacks."""
    done = {(line["mode"], line["seq_len"], line["seed"], line["text"]) for line in results(options.results)}
    text = ", ".join(Path(file).name for file in options.files) or "embedded corpus"
    for seed, seq_len, mode in itertools.product(options.seeds, options.seq_lens, options.modes):
        if (mode, seq_len, seed, text) not in done:
            line = {"mode": mode, "seq_len": seq_len, "seed": seed, "text": text, **train(mode, seq_len, seed, options)}
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)


def train(mode: str, seq_len: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Trains one model; its held-out losses in nats a token, in both modes."""
    more = [f"--model.preset={options.preset}", *LOQT, f"--train.steps={options.steps}", f"--train.seed={seed}"]
    more += [f"--data.files+={file}" for file in options.files]
    more += [f"--data.max_eval_sequences={max(1, options.eval_tokens // seq_len)}", f"--train.device={options.device}"]
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(mode, seq_len, options.tokens // seq_len, folder, *more)
        trainer = make_trainer(config, resolve_device(options.device))
        for step in range(options.steps):
            trainer.step(step)
        trainer.finish_pending()
        return {f"scored {how}": scored(trainer, how, options.steps) for how in MODES} | {"steps": options.steps}


def scored(trainer: Trainer, mode: str, step: int) -> float:
    """Held-out nats a token, with or without masks."""
    data = replace(trainer.config.data, mask_documents=mode == "on")
    attend(trainer.built.model, data, separator=trainer.corpus.tokenizer.eos_token_id)
    return round(trainer.evaluate(step), 5)


def results(file: Path) -> list[dict[str, Any]]:
    """The lines of a results file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def show(options: argparse.Namespace) -> None:
    """Prints the table of quality."""
    lines = sorted(results(options.results), key=itemgetter("text", "seq_len", "seed"))
    header = ["text", "tokens a sequence", "seed", *(f"trained {a}, scored {b}" for a in MODES for b in MODES)]
    header += ["on - off, scored on"]
    publish(
        "Masked documents: quality",
        "python benchmarks/documents.py --quality --files short.txt --seeds 0 1 2",
        table(header, list(quality_rows(lines)))
        + "\n\nHeld-out nats a token of text in bytes. short.txt: documents of fewer than 1,200 bytes (mean 540).",
        keep=options.publish,
    )


def quality_rows(lines: list[dict[str, Any]]) -> Iterator[list[object]]:
    """A row for each pair of runs that differ in their masks alone."""
    for (text, seq_len, seed), pair in itertools.groupby(
        lines, lambda line: (line["text"], line["seq_len"], line["seed"])
    ):
        found = {line["mode"]: line for line in pair}
        if len(found) == len(MODES):
            losses = [found[a][f"scored {b}"] for a in MODES for b in MODES]
            yield [text, seq_len, seed, *(f"{loss:.4f}" for loss in losses), f"{losses[3] - losses[1]:+.4f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--publish", action="store_true", help="keep the table in RESULTS.md")
    parser.add_argument("--preset")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seq_lens", type=int, nargs="+", default=None)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--files", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="of training")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--eval_tokens", type=int, default=2**17)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "documents.jsonl")
    options = parser.parse_args()
    options.seq_lens = options.seq_lens or ([1024] if options.quality else [256, 1024, 2048])
    options.preset = options.preset or ("llama_nano" if options.quality else "llama_60m")
    show(options) if options.table else quality(options) if options.quality else cost(options)


if __name__ == "__main__":
    sys.exit(main())
