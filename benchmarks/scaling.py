"""How cost grows: step time, merge time and state against hidden size and rank, as fitted exponents.

A model of two blocks; the exponent is the slope of a line through (log size, log cost). Beside it the exponent that
counting predicts, for the range that was measured: FLOPs of a step (torch's own counter), and bytes of state from the
planner's shapes. Ranks (fsdp over gloo, the global batch stays): what one rank holds, from the planner, and the CPU
seconds of one rank, all its threads, since there may be fewer cores than ranks: waiting for others does not count.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --quick       # small shapes, to see that it runs
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from math import log
from pathlib import Path

from common import ROOT, publish, table

sys.path.insert(0, str(ROOT))

import torch
from step_time import count_flops, merge_of, seconds, update

from loqt_scale.config.yaml import parse_run_config
from loqt_scale.plan import plan_run
from loqt_scale.training.trainer import Trainer
from tests.distributed.footprint_tasks import make_trainer, update_without_merge
from tests.distributed.pool import RankPool

SEQ_LEN, SEQUENCES, BYTES = 128, 4, 320


def words_of(hidden: int, rank: int, folder: str) -> list[str]:
    """Settings of a two-block LLaMA of this width."""
    intermediate = 64 * round(hidden * 8 / 3 / 64)
    sizes = f"hidden_size: {hidden}, intermediate_size: {intermediate}, num_hidden_layers: 2"
    words = [f"--model.overrides={{{sizes}, num_attention_heads: 8, num_key_value_heads: 8}}", f"--loqt.rank={rank}"]
    words += ["--loqt.merge.gap=1", "--data.tokenizer=bytes", f"--data.seq_len={SEQ_LEN}", "--train.steps=1000"]
    words += [f"--train.global_batch_size={SEQUENCES}", f"--train.micro_batch_size={SEQUENCES}", "--optim.lr=1e-3"]
    return [*words, "--data.max_eval_sequences=2", "--train.progress=off", f"--train.run_dir={Path(folder) / 'run'}"]


def held_bytes(words: list[str], ranks: int = 1) -> int:
    """State of one rank between steps."""
    return plan_run(parse_run_config(words), ranks=ranks, vocab_size=BYTES).memory.held


def measure(words: list[str]) -> tuple[float, float, int]:
    """(seconds of a step, of a merge with all it adds to its step, FLOPs of a step)."""
    trainer: Trainer = make_trainer(parse_run_config([*words, "--parallel.strategy=single"]))
    merge_of(trainer, 0)()
    update(trainer, 1)
    steps = [seconds(lambda: update(trainer, 2)) for _ in range(5)]
    step = statistics.median(steps)
    merges = []
    for index in (1, 2, 3):
        merges.append(seconds(lambda i=index: merge_of(trainer, i)()) - step)
    return step, statistics.median(merges), count_flops(trainer)


def rank_costs(words: list[str]) -> tuple[float, float, int]:
    """(CPU seconds of a step, of a merge with all it adds to its step, FLOPs of a step) of this rank. Every rank."""

    def cpu_seconds(work: Callable[[], object]) -> float:
        started = time.process_time()
        work()
        return time.process_time() - started

    def merge_step(index: int) -> None:
        assert trainer.merges is not None
        step = trainer.merges.steps[index]
        update_without_merge(trainer, step)
        trainer.merges.finish(step)

    trainer = make_trainer(parse_run_config(words))
    try:
        merge_step(0)
        update(trainer, 1)
        step = statistics.median(cpu_seconds(lambda: update(trainer, 2)) for _ in range(5))
        merges = [cpu_seconds(partial(merge_step, index)) - step for index in (1, 2, 3)]
        return step, statistics.median(merges), count_flops(trainer)
    finally:
        trainer.strategy.close()


def against_ranks(words: list[str], counts: list[int]) -> tuple[list[list[object]], list[list[str]]]:
    """(rows of costs, rows of exponents) of one rank out of so many."""
    pool, rows = RankPool(), []
    series: list[list[float]] = [[], [], [], []]
    for count in counts:
        costs = pool.run(count, "scaling:rank_costs", timeout=1200, words=words)
        step, merge, flops = (max(column) for column in zip(*costs, strict=True))
        held = held_bytes(words, count)
        for values, value in zip(series, (step, merge, held, flops), strict=True):
            values.append(value)
        rows.append(["ranks", count, f"{step:.3f}", f"{merge:.3f}", f"{held / 2**20:.1f}"])
        print(rows[-1], flush=True)
    pool.close()
    slopes = [f"{exponent(counts, values):.2f}" for values in series]
    return rows, [
        ["CPU time of a rank's step, ranks", slopes[0], f"{slopes[3]} (FLOPs: every rank folds all of W)"],
        ["CPU time of a rank's merge, ranks", slopes[1], "-1 (rows and layers are shared out)"],
        ["state of a rank, ranks (planner)", slopes[2], "-1"],
    ]


def exponent(sizes: list[int], costs: list[float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    xs, ys = [log(size) for size in sizes], [log(cost) for cost in costs]
    mean_x, mean_y = statistics.mean(xs), statistics.mean(ys)
    above = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return above / sum((x - mean_x) ** 2 for x in xs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes; does not touch RESULTS.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    widths, ranks = ([128, 256], [32, 64]) if options.quick else ([256, 512, 1024, 2048], [32, 64, 128, 256, 512])
    fixed_width, fixed_rank = (256, 32) if options.quick else (1024, 128)
    rows, fits = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, sizes in (("hidden size", widths), ("rank", ranks)):
            series: list[list[float]] = [[], [], [], []]
            for size in sizes:
                hidden, rank = (size, fixed_rank) if name == "hidden size" else (fixed_width, size)
                words = words_of(hidden, min(rank, hidden // 2), folder)
                step, merge, flops = measure(words)
                held = held_bytes(words)
                for values, value in zip(series, (step, merge, held, flops), strict=True):
                    values.append(value)
                rows.append([name, size, f"{step:.3f}", f"{merge:.3f}", f"{held / 2**20:.1f}"])
                print(rows[-1], flush=True)
            slopes = [exponent(sizes, values) for values in series]
            fits.append([f"step time, {name}", f"{slopes[0]:.2f}", f"{slopes[3]:.2f} (FLOPs)"])
            predicted = (
                "between 1 (sketch, factorising) and 2 (quantizing)"
                if name == "hidden size"
                else "between 0 (quantizing) and 2 (factorising)"
            )
            fits.append([f"merge time, {name}", f"{slopes[1]:.2f}", predicted])
            predicted = "2 at most (W; B and embedding: 1)" if name == "hidden size" else "1 at most (B, P; W: 0)"
            fits.append([f"state, {name}", f"{slopes[2]:.2f}", predicted])
        words = words_of(fixed_width, fixed_rank, folder)
        more = against_ranks(words, [1, 2] if options.quick else [1, 2, 4])
    rows, fits = rows + more[0], fits + more[1]
    text = (
        f"{table(['against', 'size', 'step, s', 'merge, s', 'state, MiB'], rows)}\n\n"
        f"{table(['cost against', 'fitted exponent', 'predicted'], fits)}\n\nLLaMA blocks, two of them, float32, one "
        f"thread, {SEQUENCES} sequences of {SEQ_LEN} tokens; rank {fixed_rank} where the hidden size varies, hidden "
        f"size {fixed_width} where the rank does. `merge`: with all it adds to its step. State: parameters and moments."
    )
    publish("How cost grows", "python benchmarks/scaling.py", text, keep=not options.quick)


if __name__ == "__main__":
    main()
