"""What the examples share: LoQT against full rank over seeds, as a table and a figure.

    python examples/NAME.py            both methods, three seeds: the table, and NAME.png in runs/examples
    python examples/NAME.py --sweep    one seed of every learning rate that was tried
    python examples/NAME.py --short    seconds: to see that it works

Finished runs are kept in `results.jsonl`; the same command goes on after the last of them. They are known by method,
seed, rate and options: delete the file if you change an example.

Under torchrun every rank calls `compare` after its process group is made: rank 0 reads, writes, prints and draws, and
all train what it found missing.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from report import Result, draw, means, measured, table

__all__ = ["Result", "arguments", "compare", "folder_of", "kept_or_run", "means", "measured"]


def compare(
    train: Callable[[str, int, float, bool], Result],
    *,
    name: str,
    score: str,
    curve: str,
    rates: dict[str, list[float]],
) -> dict[str, list[Result]]:
    """Runs `train(method, seed, rate, short)` for all; `rates`: by method, the best first, the rest for `--sweep`."""
    args, options = arguments()  # an example's own options are part of what a run is known by
    folder = folder_of(name)
    seeds = range(1 if args.sweep or args.short else args.seeds)
    runs = [
        [m, seed, rate, *options]
        for m in rates
        for rate in (rates[m] if args.sweep else rates[m][:1])
        for seed in seeds
    ]
    found: dict[str, list[Result]] = {}
    for run in runs:
        label = f"{run[0]} lr {run[2]:g}"
        found.setdefault(label, []).append(kept_or_run(folder, train, run, args.short))
    if _is_first():
        print(table(found, score, each=" a rank" if dist.is_initialized() else ""))
        draw(found, curve, args.out / f"{folder.name}.png")
    return found


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """What all examples take, and the rest."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sweep", action="store_true", help="every learning rate, one seed")
    parser.add_argument("--short", action="store_true", help="seconds")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"))
    return parser.parse_known_args()


def folder_of(name: str) -> Path:
    """Where an example keeps its runs and pictures."""
    args, _ = arguments()
    folder = args.out / (f"{name}-short" if args.short else name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def kept_or_run(folder: Path, train: Callable[..., Result], run: list, short: bool) -> Result:
    """The result of [method, seed, rate, options ...]."""
    file = folder / "results.jsonl"
    known = file.read_text().splitlines() if _is_first() and file.exists() else []
    kept = _of_first([Result(**line["result"]) for line in map(json.loads, known) if line["run"] == run][:1])
    if kept:
        return kept[0]
    (method, seed, rate), started = run[:3], time.perf_counter()
    result = train(method, seed, rate, short)
    seconds = time.perf_counter() - started
    if _is_first():
        print(f"{method}, seed {seed}, learning rate {rate:g}: {result.score:.4g} ({seconds:.0f} s)", flush=True)
        with file.open("a") as out:
            out.write(json.dumps({"run": run, "seconds": seconds, "result": asdict(result)}) + "\n")
    return result


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _of_first(value: list) -> list:
    """What rank 0 has, on every rank."""
    held = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(held)
    return held[0]
