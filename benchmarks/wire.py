"""Bytes on the wire of a step and of a merge under FSDP2: LoQT beside full-rank training, on 2 and 4 ranks.

Counted at the collectives themselves (`metrics.wire_counter`), at the LLaMA 60M shape.

    python benchmarks/wire.py
    python benchmarks/wire.py --quick       # a small shape, to see that it runs
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, publish, table

sys.path.insert(0, str(ROOT))

from loqt_scale.config.yaml import parse_run_config
from tests.distributed.footprint_tasks import make_trainer
from tests.distributed.pool import RankPool

# (compute, r, blocks are gathered twice a pass, passes of a step, what stays whole between them)
CASES = [
    ("float32", 128, True, 1, "gradients"),
    ("float32", 128, False, 1, "gradients"),
    ("float32", 32, False, 1, "gradients"),
    ("bfloat16", 128, False, 1, "gradients"),
    ("float32", 128, True, 8, "gradients"),
    ("float32", 128, True, 8, "trained"),
    ("bfloat16", 128, True, 8, "gradients"),
    ("bfloat16", 128, True, 8, "trained"),
]


def measure(words: list[str]) -> dict[str, int]:
    """Ring bytes of a normal step and of a merge on this rank. Every rank."""
    from loqt_scale.metrics.wire_counter import WireCounter

    fixed = ["--data.tokenizer=bytes", "--data.max_eval_sequences=2", "--train.progress=off", "--train.steps=20"]
    trainer = make_trainer(parse_run_config([*fixed, "--loqt.merge.gap=2", *words]))
    with WireCounter() as merge_step:
        trainer.step(0)
    with WireCounter() as step:
        trainer.step(1)
    return {"step": step.sent_bytes(), "merge": merge_step.sent_bytes() - step.sent_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape; does not touch RESULTS.md")
    options = parser.parse_args()
    preset = "llama_micro" if options.quick else "llama_60m"
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        shape = [f"--model.preset={preset}", "--data.seq_len=64", "--train.micro_batch_size=1"]
        shape += [f"--train.run_dir={Path(folder) / 'run'}", "--parallel.strategy=fsdp"]
        for ranks in (2, 4):
            pool = RankPool()
            for dtype, rank, reshard, passes, kept in CASES[:1] if options.quick else CASES:
                words = [*shape, f"--model.dtype={dtype}", f"--parallel.reshard_after_forward={str(reshard).lower()}"]
                words += [f"--loqt.rank={32 if options.quick else rank}", f"--parallel.kept_between_passes={kept}"]
                words += [f"--train.global_batch_size={ranks * passes}"]
                loqt, full = (
                    pool.run(ranks, "wire:measure", words=[*words, f"--method={method}"])[0]
                    for method in ("loqt", "full")
                )
                ratio = f"**{loqt['step'] / full['step']:.3f}**"
                mebibytes = [f"{size / 2**20:.1f}" for size in (full["step"], loqt["step"], loqt["merge"])]
                rows.append([ranks, dtype, rank, "twice" if reshard else "once", passes, kept, *mebibytes, ratio])
                print(rows[-1], flush=True)
            pool.close()
    header = ["ranks", "compute", "r", "blocks are gathered", "passes", "kept", "full step, MiB", "loqt step, MiB"]
    header += ["merge, MiB", "ratio"]
    text = (
        f"{table(header, rows)}\n\n{preset}, byte vocabulary (320); what one rank sends in a ring. In a pass LoQT "
        "gathers the packed W (4.5 bits a weight), the packed P and B, and in the last reduces B's gradient. B has "
        "r / 512 of W's values here, so r = 128 alone is a quarter of what full-rank training gathers and reduces: the "
        "ratio falls with r / hidden, and where several passes make a step and what trains stays gathered between them "
        "(`trained`). The merge sends its sketches once a pass."
    )
    publish("Bytes on the wire", "python benchmarks/wire.py", text, keep=not options.quick)


if __name__ == "__main__":
    main()
