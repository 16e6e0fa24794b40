"""What a rank holds, allocates in passing and sends: LoQT beside full-rank training, at the LLaMA 60M shape.

Two FSDP2 ranks on one machine, then one process. Everything is measured, nothing computed from shapes: storages of
live tensors, the CPU allocator's own log, the collectives themselves (`tests/distributed/footprint_tasks.py`, whose
tests hold these numbers to predictions). The vocabulary is the byte tokenizer's, 320 tokens instead of the paper's
32100, because the embedding and the head are the same under both methods and would hide what differs.

    python benchmarks/footprint.py               # some minutes on two cores
    python benchmarks/footprint.py --quick       # a small shape, to see that it runs
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, publish, table

sys.path.insert(0, str(ROOT))

from loqt_scale.config import RunConfig
from loqt_scale.config.yaml import parse_run_config
from tests.distributed.footprint_tasks import (
    kinds_held,
    make_trainer,
    measured_peaks,
    update_without_merge,
)
from tests.distributed.instruments import allocations
from tests.distributed.pool import RankPool

KINDS = {
    "codes": "codes of W",
    "scales": "scales of W",
    "projection": "P",
    "factor": "B",
    "full_precision": "full-precision parameters",
    "gradients": "gradients",
    "adam": "moments",
}
METHODS = ("loqt", "full")
RANKS = 2


def run_config(words: list[str]) -> RunConfig:
    """The run of all measurements, with `words` added."""
    fixed = ["--data.tokenizer=bytes", "--data.max_eval_sequences=2", "--train.progress=off", "--train.steps=20"]
    return parse_run_config([*fixed, "--loqt.merge.gap=2", "--optim.lr=1e-3", *words])


def measure_rank(words: list[str]) -> dict[str, Any]:
    """Bytes held, allocated in passing and sent on this rank. Every rank."""
    from loqt_scale.metrics.wire_counter import WireCounter
    from loqt_scale.model.build import build_model, design_model

    config = run_config(words)
    trainer = make_trainer(config)
    strategy, merges = trainer.strategy, trainer.merges
    result: dict[str, Any] = {}
    with allocations() as start:
        build_model(design_model(config, vocab_size=trainer.corpus.tokenizer.vocab_size), config.model, strategy)
    result["build_passing"] = start.passing
    trainer.step(0)
    with WireCounter() as counter:
        trainer.step(1)
    result["step_wire"] = (counter.payload_bytes(), counter.sent_bytes())
    trainer.accumulate(2)
    result["held"] = kinds_held(trainer)
    trainer.optimizer.zero_grad(set_to_none=True)
    if merges is not None:
        update_without_merge(trainer, merges.steps[1])
        with WireCounter() as counter, allocations() as merge:
            merges.finish(merges.steps[1])
        result["merge_wire"] = (counter.payload_bytes(), counter.sent_bytes())
        result["merge_passing"] = merge.passing
    return result


def measure_peaks(words: list[str]) -> dict[str, int]:
    """Most bytes of tensors alive at any moment of a normal step and of a merge step, in one process."""
    return measured_peaks(run_config(words))


def mebibytes(value: int | None) -> str:
    """MiB with two digits; a dash for what does not exist."""
    return "-" if value is None else f"{value / 2**20:.2f}"


def rank_table(results: dict[str, list[dict[str, Any]]]) -> str:
    """The two methods side by side; of the ranks, the one that has most."""

    def most(method: str, *keys: Any) -> int | None:
        values = []
        for result in results[method]:
            value: Any = result
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else value[key] if value is not None else None
            values.append(value)
        return None if values[0] is None else max(values)

    rows = [[f"held: {text}", *(mebibytes(most(m, "held", kind)) for m in METHODS)] for kind, text in KINDS.items()]
    totals = (max(sum(result["held"].values()) for result in results[method]) for method in METHODS)
    rows.append(["**held: all of these**", *map(mebibytes, totals)])
    rows.append(["in passing: start-up", *(mebibytes(most(m, "build_passing")) for m in METHODS)])
    rows.append(["in passing: a merge", *(mebibytes(most(m, "merge_passing")) for m in METHODS)])
    for name, text in (("step_wire", "a step"), ("merge_wire", "a merge")):
        for index, measure in enumerate(("payload", "sent in a ring")):
            rows.append([f"wire: {text}, {measure}", *(mebibytes(most(m, name, index)) for m in METHODS)])
    return table([f"MiB per rank, {RANKS} ranks", *METHODS], rows)


def peak_table(peaks: dict[str, dict[str, int]]) -> str:
    """Peaks of one process, absolute and against full-rank training's step."""
    full = peaks["full"]["step"]
    cases = [("full", "step"), ("loqt", "step"), ("loqt", "merge")]
    rows = []
    for method, name in cases:
        size, kind = peaks[method][name], "a merge step" if name == "merge" else "a normal step"
        rows.append([f"{method}, {kind}", mebibytes(size), f"{size / full:.2f}"])
    return table(["one process, everything alive at the peak", "MiB", "to full's step"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape; does not touch RESULTS.md")
    options = parser.parse_args()
    preset, rank, seq_len = ("llama_micro", 16, 64) if options.quick else ("llama_60m", 128, 256)
    pool = RankPool()
    with tempfile.TemporaryDirectory() as folder:
        shape = [f"--model.preset={preset}", f"--loqt.rank={rank}", f"--data.seq_len={seq_len}"]
        shape += [
            "--train.global_batch_size=4",
            "--train.micro_batch_size=2",
            f"--train.run_dir={Path(folder) / 'run'}",
        ]
        shared, peaks = {}, {}
        for method in METHODS:
            words = [*shape, f"--method={method}"]
            shared[method] = pool.run(RANKS, "footprint:measure_rank", words=[*words, "--parallel.strategy=fsdp"])
            peaks[method] = pool.run(1, "footprint:measure_peaks", words=[*words, "--parallel.strategy=single"])[0]
            print(f"{method}: measured", flush=True)
    pool.close()
    notes = (
        f"{preset} with the byte tokenizer's vocabulary (320), rank {rank}, float32, 4 sequences of {seq_len} tokens a "
        "step in micro-batches of 2, blocks gathered again for backward. Full-rank training's linears count as "
        "full-precision parameters. `in passing`: the highest moment beyond what "
        "stays. `payload`: whole tensors as the collectives see them; `sent in a ring`: what one rank sends. The peaks "
        "include activations. Workspaces of gloo and of BLAS are not torch's and not in the log."
    )
    text = f"{rank_table(shared)}\n\n{peak_table(peaks)}\n\n{notes}"
    publish(
        "Footprint: bytes held, allocated in passing and sent",
        "python benchmarks/footprint.py",
        text,
        keep=not options.quick,
    )


if __name__ == "__main__":
    main()
