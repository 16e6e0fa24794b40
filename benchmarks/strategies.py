"""What a LoQT step costs, and what a rank holds, under ddp, fsdp and ZeRO stages 1, 2 and 3: same model, same ranks.

All strategies live in the same rank processes and take turns, A B C A B C, so that what else the machine does hits all
alike; the result is the median over the rounds of time(strategy) / time(fsdp). Bytes are read off live tensors.

    python benchmarks/strategies.py              # LLaMA 60M shape on 2 ranks
    python benchmarks/strategies.py --quick      # a small shape, to see that it runs
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import publish, table

from loqt_scale.config.yaml import parse_run_config
from tests.distributed.footprint_tasks import kinds_held, live_tensor_bytes, make_trainer
from tests.distributed.pool import RankPool

STRATEGIES = ("fsdp", "ddp", "zero-1", "zero-2", "zero-3")
KINDS = {
    "codes": "codes of W",
    "scales": "scales of W",
    "projection": "P",
    "factor": "B",
    "full_precision": "full-precision parameters",
    "masters": "float32 masters",
    "adam": "moments",
    "other": "buffers between steps",
    "gradients": "gradients before the update, beyond that",
}


def words_of(strategy: str) -> list[str]:
    """`zero-2` as command-line words."""
    name, _, stage = strategy.partition("-")
    return [f"--parallel.strategy={name}", *([f"--parallel.zero_stage={stage}"] if stage else [])]


def measure(words: list[str], repeats: int) -> dict[str, Any]:
    """Seconds of steps and merges by strategy, and bytes held by kind, on this rank. Every rank."""
    trainers, held = {}, {}
    for strategy in STRATEGIES:
        before = live_tensor_bytes()
        trainer = trainers[strategy] = make_trainer(parse_run_config([*words, *words_of(strategy)]))
        for step in (0, 1):  # the first ends in a merge
            trainer.step(step)
        kinds = dict(kinds_held(trainer))
        kinds["other"] = live_tensor_bytes() - before - sum(kinds.values())
        alive = live_tensor_bytes()
        trainer.accumulate(2)
        kinds["gradients"] = live_tensor_bytes() - alive
        trainer.strategy.step.update(trainer.model, trainer.optimizer, trainer.parameters, max_norm=1.0)
        held[strategy] = kinds
    seconds: dict[str, dict[str, list[float]]] = {s: {"step": [], "merge": []} for s in STRATEGIES}
    for turn in range(repeats):
        for strategy in STRATEGIES if turn % 2 == 0 else STRATEGIES[::-1]:
            trainer = trainers[strategy]
            assert trainer.merges is not None
            step = trainer.merges.steps[1 + turn]
            for name, number in (("step", step - 1), ("merge", step)):
                trainer.strategy.comm.barrier()
                gc.collect()
                started = time.perf_counter()
                trainer.step(number)
                trainer.strategy.comm.barrier()
                seconds[strategy][name].append(time.perf_counter() - started)
    return {"held": held, "seconds": seconds}


def time_table(seconds: dict[str, dict[str, list[float]]]) -> str:
    """Medians, and the ratios to fsdp within each round."""
    rows = []
    for strategy in STRATEGIES:
        mine, fsdp = seconds[strategy]["step"], seconds["fsdp"]["step"]
        ratios = sorted(a / b for a, b in zip(mine, fsdp, strict=True))
        step, merge = statistics.median(mine), statistics.median(seconds[strategy]["merge"])
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        rows.append([strategy, f"{step:.3f}", f"**{statistics.median(ratios):.2f}**", spread, f"{merge / step:.1f}"])
    return table(["strategy", "step, s", "step / fsdp's", "rounds from ... to", "merge step / step"], rows)


def held_table(results: list[dict[str, Any]]) -> str:
    """MiB by kind and strategy; of the ranks, the one that has most."""

    def most(strategy: str, kind: str) -> float:
        return max(result["held"][strategy].get(kind, 0) for result in results) / 2**20

    rows = [[text, *(f"{most(s, kind):.2f}" for s in STRATEGIES)] for kind, text in KINDS.items()]
    totals = (max(sum(result["held"][s].values()) for result in results) / 2**20 for s in STRATEGIES)
    return table(["MiB per rank", *STRATEGIES], [*rows, ["**all of these**", *(f"{total:.2f}" for total in totals)]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7, help="rounds of steps")
    parser.add_argument("--quick", action="store_true", help="a small shape; does not touch RESULTS.md")
    options = parser.parse_args()
    preset, rank, seq_len = ("llama_micro", 16, 64) if options.quick else ("llama_60m", 128, 128)
    repeats = 2 if options.quick else options.repeats
    pool = RankPool()
    with tempfile.TemporaryDirectory() as folder:
        words = [f"--model.preset={preset}", f"--loqt.rank={rank}", f"--data.seq_len={seq_len}"]
        words += ["--loqt.merge.gap=2", "--loqt.merge.schedule=constant", "--train.steps=1000"]
        words += ["--data.tokenizer=bytes", "--data.max_eval_sequences=2", "--optim.lr=1e-3", "--train.progress=off"]
        words += [f"--train.global_batch_size={4 * options.ranks}", "--train.micro_batch_size=4"]
        words += [f"--train.run_dir={Path(folder) / 'run'}"]
        results = pool.run(options.ranks, "strategies:measure", timeout=3000, words=words, repeats=repeats)
    pool.close()
    text = (
        f"{time_table(results[0]['seconds'])}\n\n{held_table(results)}\n\n"
        f"{preset} with the byte tokenizer's vocabulary (320), rank {rank}, float32, 4 sequences of {seq_len} tokens a "
        f"rank and step, {options.ranks} ranks over gloo, one thread each; {repeats} rounds. Under float32 ZeRO holds "
        "B and the full-precision parameters twice: as parameters and as masters. Stages 1 and 2 replicate the packed "
        "base. `buffers between steps`: DeepSpeed's reduction bucket and, under stage 3, its gradient shard; for all, "
        "the last chunk of drawn weights."
    )
    publish("Strategies: ddp, fsdp and ZeRO", "python benchmarks/strategies.py", text, keep=not options.quick)


if __name__ == "__main__":
    main()
