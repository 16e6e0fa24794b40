"""How much of a merge is waiting: what overlapping it with the next step could save.

A merge that ran beside the next step would do the same work on the same device, and write each layer before that step
reads it. So it could hide no more than the time in which the device has nothing to do. On a CPU that is wall time less
processor time, on every rank; waiting for other ranks is in it.

    python benchmarks/merge_waiting.py                   # LLaMA 60M shape, 1 and 2 ranks of fsdp, a thread each
    python benchmarks/merge_waiting.py --quick           # a small shape, to see that it runs
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import launcher, publish, table
from step_time import merge_of, seconds, trainer_of, update

PASSED_ON = ("preset", "rank", "sequences", "micro_batch", "merges")


def measure(options: argparse.Namespace) -> None:
    """One rank's part: writes its medians to a file of its own in `options.found`."""
    torch.set_num_threads(1)
    strategy = "single" if options.ranks == 1 else "fsdp"
    words = (f"--train.micro_batch_size={options.micro_batch}", f"--parallel.strategy={strategy}")
    trainer = trainer_of("loqt", "float32", options, str(Path(options.found) / "runs"), *words)
    merge_of(trainer, 0)()
    update(trainer, 1)
    steps, walls, works = [], [], []
    for index in range(1, options.merges + 1):
        steps.append(seconds(lambda: update(trainer, 900)))
        merge = merge_of(trainer, index)
        started, worked = time.perf_counter(), time.process_time()
        merge()
        walls.append(time.perf_counter() - started)
        works.append(time.process_time() - worked)
    rank = trainer.strategy.comm.rank
    found = [statistics.median(values) for values in (steps, walls, works)]
    Path(options.found, f"rank{rank}.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama_60m")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--micro_batch", type=int, default=4, help="sequences a pass and rank")
    parser.add_argument("--merges", type=int, default=4)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--found", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="a small shape; does not touch RESULTS.md")
    options = parser.parse_args()
    options.seq_len = 256
    if options.quick:
        options.preset, options.rank, options.sequences, options.micro_batch = "llama_micro", 32, 2, 1
        options.merges = 1
    if options.found:
        options.ranks = options.ranks[0]
        measure(options)
        return
    rows = []
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            words = [f"--{key}={getattr(options, key)}" for key in PASSED_ON]
            command = [*launcher(ranks), __file__, *words, "--ranks", str(ranks), "--found", folder]
            subprocess.run(command, check=True, stdout=sys.stderr)
            for rank in range(ranks):
                step, wall, work = json.loads(Path(folder, f"rank{rank}.json").read_text())
                rows.append([f"{rank} of {ranks}", f"{step:.2f}", f"{wall / step:.3f}", f"{1 - work / wall:.1%}"])
    publish(
        "How much of a merge is waiting",
        "python benchmarks/merge_waiting.py",
        f"{table(['rank', 'a step, s', '`finish`, steps', 'of that waiting'], rows)}\n\n{options.preset}, rank "
        f"{options.rank}, float32, steps of {options.sequences * options.seq_len} tokens, fsdp over gloo, a thread and "
        f"a core a rank, medians of {options.merges} merges. `finish` is what follows the update: all of a merge but "
        "its sketches and P, which are found in the backward pass.",
        keep=not options.quick,
    )


if __name__ == "__main__":
    main()
