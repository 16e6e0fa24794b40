"""What a pretrained model loses by quantization, what makes up for it, and what is left of that after some steps.

Every case is a run of the folder's model on the given text: its held-out loss before the first step, and for some cases
after the first merge and after a short training. Results are kept, a line a case, and a case that is there already is
not run again (remove --results to start anew).

    python benchmarks/pretrained.py --folder MODEL --text FILE                      # everything
    python benchmarks/pretrained.py --folder MODEL --text FILE --only starts        # no training
    python benchmarks/pretrained.py --folder MODEL --text FILE --ranks 64 --rounds 1 --steps 20
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import ROOT, publish, table

sys.path.insert(0, str(ROOT))

from loqt_scale.config.yaml import parse_run_config
from loqt_scale.layers import loqt_layers
from loqt_scale.training.trainer import Trainer
from tests.distributed.footprint_tasks import make_trainer

RESULTS = ROOT / "benchmarks" / "pretrained.jsonl"
HEADER = ["weights", "start", "MB of the linears", "error", "loss before step 1", "after merge 1", "after {} steps"]
MEGABYTE = 1e6


def starts(options: argparse.Namespace) -> Iterator[tuple[str, str, list[str], int]]:
    """(weights, start, settings, steps) of the cases that are only evaluated."""
    yield "float32", "dense", ["--method", "full"], 0
    rank = ["--loqt.rank", str(min(options.ranks))]
    for scheme, block in (("nf4", 64), ("nf4", 32), ("nf4_double", 64), ("int8", 64)):
        yield f"{scheme}, blocks of {block}", "bare", [*rank, *quantized(scheme, block)], 0
    for rank_ in options.ranks:
        for rounds in options.rounds:
            yield "nf4, blocks of 64", f"loftq, rank {rank_}, rounds {rounds}", compensated(rank_, rounds), 0
    middle, rounds = options.ranks[len(options.ranks) // 2], options.rounds[0]
    for scheme, block in (("nf4", 32), ("nf4_double", 64), ("int8", 64)):
        words = [*compensated(middle, rounds), *quantized(scheme, block)]
        yield f"{scheme}, blocks of {block}", f"loftq, rank {middle}, rounds {rounds}", words, 0


def trainings(options: argparse.Namespace) -> Iterator[tuple[str, str, list[str], int]]:
    """The cases that are trained: from bare weights and compensated ones, int8 and NF4 in about equal bytes."""
    middle, rounds = options.ranks[len(options.ranks) // 2], options.rounds[0]
    yield "nf4, blocks of 64", f"loftq, rank {middle}, rounds {rounds}", compensated(middle, rounds), options.steps
    for scheme, rank in (("nf4", middle), ("int8", middle), ("int8", min(options.ranks)), ("nf4", max(options.ranks))):
        words = [*compensated(rank, rounds), "--loqt.init", "zero", *quantized(scheme, 64)]
        yield f"{scheme}, blocks of 64", f"bare, rank {rank}, rounds {rounds}", words, options.steps


def quantized(scheme: str, block: int) -> list[str]:
    """Settings of a base's storage."""
    return ["--loqt.quantization.weight", scheme, "--loqt.quantization.block_size", str(block)]


def compensated(rank: int, rounds: int) -> list[str]:
    """Settings of a start by LoftQ."""
    return ["--loqt.init", "loftq", "--loqt.rank", str(rank), "--loqt.merge.compensation_rounds", str(rounds)]


def trainer_of(options: argparse.Namespace, words: list[str], run_dir: str) -> Trainer:
    """The product's trainer, on the folder's model."""
    fixed = ["--model.path", options.folder, "--model.weights", "pretrained", "--model.overrides", "{}"]
    fixed += ["--data.tokenizer", options.folder, "--data.files", json.dumps([options.text])]
    fixed += ["--data.seq_len", str(options.seq_len), "--data.max_eval_sequences", str(options.eval_sequences)]
    fixed += ["--optim.lr", str(options.lr), "--optim.full_precision_lr", str(options.lr / 10)]
    fixed += ["--optim.warmup_fraction", "0.1", "--train.steps", str(max(options.steps, 1)), "--train.progress", "off"]
    fixed += ["--train.global_batch_size", str(options.batch), "--train.micro_batch_size", str(options.batch)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return make_trainer(parse_run_config([*fixed, "--train.run_dir", run_dir, *words]), device)


def measure(options: argparse.Namespace, words: list[str], steps: int) -> dict[str, Any]:
    """One case: bytes, the start's error, held-out losses, seconds of the start."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(options, words, folder)
        report = None if trainer.merges is None else trainer.merges.begin()
        result: dict[str, Any] = {"bytes": linear_bytes(trainer), "before": trainer.evaluate(0)}
        if report is not None:
            result |= {"error": report.means()["error_after"], "seconds": report.seconds}
        for step in range(steps):
            trainer.step(step)
            if step == 0:
                result["merged"] = trainer.evaluate(1)
        if steps:
            result["after"] = trainer.evaluate(steps)
        trainer.strategy.close()
    return result


def linear_bytes(trainer: Trainer) -> int:
    """Bytes of W_q, P and B; of the linears' dense weights under full-rank training."""
    layers = [parameter for _, layer in loqt_layers(trainer.built.model) for parameter in layer.merged_parameters()]
    dense = {f"{name}.weight" for name in trainer.built.dense_layers}
    layers += [parameter for name, parameter in trainer.built.model.named_parameters() if name in dense]
    return sum(parameter.nbytes for parameter in layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="what save_pretrained wrote, with its tokenizer")
    parser.add_argument("--text", required=True)
    parser.add_argument("--name", help="what the table calls the model (default: the folder's name)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--steps", type=int, default=30, help="of the cases that are trained")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the factors; the rest gets a tenth")
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--eval_sequences", type=int, default=32)
    parser.add_argument("--only", choices=["starts", "trainings"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no_publish", action="store_true", help="does not touch RESULTS.md")
    options = parser.parse_args()
    known = read(options.results)
    groups = {"starts": starts, "trainings": trainings}
    cases = [case for name, group in groups.items() if options.only in (None, name) for case in group(options)]
    conditions = [options.name or Path(options.folder).name, options.seq_len, options.eval_sequences]
    for weights, start, words, steps in cases:
        how = [steps, options.batch, options.lr] if steps else []
        key = json.dumps([*conditions, weights, start, *how])
        if key not in known:
            began = time.perf_counter()
            known[key] = {"weights": weights, "start": start, "steps": steps} | measure(options, words, steps)
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key} | known[key]) + "\n")
            print(f"{weights}; {start}: {known[key]} ({time.perf_counter() - began:.0f}s)", flush=True)
    rows = [row(result) for key, result in known.items() if json.loads(key)[:3] == conditions]
    command = f"python benchmarks/pretrained.py --folder {conditions[0]} --text TEXT"
    publish(
        f"Going on from a pretrained model: {conditions[0]}", command, text(rows, options), keep=not options.no_publish
    )


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Results so far, by what they were made with."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {result.pop("key"): result for result in map(json.loads, lines)}


def row(result: dict[str, Any]) -> list[str]:
    """A line of the table."""
    losses = [f"{result[key]:.4f}" if key in result else "-" for key in ("error", "before", "merged", "after")]
    return [result["weights"], result["start"], f"{result['bytes'] / MEGABYTE:.1f}", *losses]


def text(rows: list[list[str]], options: argparse.Namespace) -> str:
    """The table and what it was made with."""
    header = [cell.format(options.steps) for cell in HEADER]
    return (
        f"{table(header, rows)}\n\nHeld-out nats a token over {options.eval_sequences} sequences of {options.seq_len} "
        "tokens. Error: ||W - W_eff|| / ||W||, mean over the layers. Bytes of W_q, P (NF4) and B (float32). Trained: "
        f"{options.batch} sequences a step, rate {options.lr:g} for the factors and a tenth of it for the rest, a "
        "tenth of the steps as warm-up."
    )


if __name__ == "__main__":
    main()
