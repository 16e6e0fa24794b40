"""What torch.compile gains: steps of compiled and of plain blocks, LoQT's and full-rank training's, in turns.

python benchmarks/compile.py           # LLaMA 60M and 130M shapes, float32 and bfloat16
python benchmarks/compile.py --quick   # a small shape, to see that it runs
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from itertools import product

import torch
from common import publish, table
from step_time import METHODS, RANKS, in_turns, merge_of, step_parser, trainer_of, update

VARIANTS = tuple(product(METHODS, (False, True)))


def compare(dtype: str, options: argparse.Namespace, folder: str) -> list[object]:
    """The row of one compute dtype."""
    trainers = {
        (method, compiled): trainer_of(method, dtype, options, folder, f"--model.compile={str(compiled).lower()}")
        for method, compiled in VARIANTS
    }
    for (method, _), trainer in trainers.items():
        if method == "loqt":
            merge_of(trainer, 0)()  # before it P and B are zero
        for step in (1, 2):
            update(trainer, step)  # compiles
    times = in_turns(VARIANTS, options.repeats, lambda variant, turn: update(trainers[variant], 3 + turn))

    def ratio(above: tuple[str, bool], below: tuple[str, bool]) -> str:
        ratios = sorted(a / b for a, b in zip(times[above], times[below], strict=True))
        return f"**{statistics.median(ratios):.3f}** ({ratios[0]:.3f} to {ratios[-1]:.3f})"

    gains = [ratio((method, True), (method, False)) for method in METHODS]
    return [options.preset, dtype, *gains, *(ratio(("loqt", c), ("full", c)) for c in (False, True))]


def main() -> None:
    options = step_parser(__doc__, repeats=7).parse_args()
    if options.quick:
        options.presets, options.sequences, options.seq_len, options.repeats = ["llama_micro"], 2, 64, 3
    torch.set_num_threads(options.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for preset, dtype in product(options.presets, options.dtypes):
            options.preset, options.rank = preset, RANKS[preset]
            rows.append(compare(dtype, options, folder))
            print(rows[-1], flush=True)
    header = ["model", "dtype", "loqt: compiled / plain", "full: compiled / plain"]
    header += ["loqt / full, plain", "loqt / full, compiled"]
    text = (
        f"{table(header, rows)}\n\nStep times; medians of {options.repeats} alternating rounds (from ... to), "
        f"{options.sequences} sequences of {options.seq_len} tokens, {options.threads} thread(s)."
    )
    command = f"python benchmarks/compile.py --presets {' '.join(options.presets)}"
    publish("torch.compile", command, text, keep=not options.quick)


if __name__ == "__main__":
    main()
