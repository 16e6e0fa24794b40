"""What a merge costs, in normal steps, and where its time goes.

Times are each part's own: what a part calls and has a name of its own is taken off. `sketch` is what a merge step takes
longer than a normal one, before the merge itself; P is found in there too (one rank: inside the backward pass).

    python benchmarks/merge.py                                  # LLaMA 60M shape, one thread
    python benchmarks/merge.py --sequences 512 --merges 1       # the paper's batch: a step takes minutes
    python benchmarks/merge.py --oversampling 1.0               # sketches of 2 r columns; does not touch RESULTS.md
    python benchmarks/merge.py --quick       # a small shape, to see that it runs
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from common import publish, table
from step_time import merge_of, seconds, trainer_of, update

from loqt_scale.functional import compensation
from loqt_scale.merge import coordinator, diagnostics, one_layer, placed, subspace

PARTS: list[tuple[Any, str, str]] = [
    (subspace.SubspaceSearch, "_factorise", "factorise"),
    (compensation, "pack", "quantize W"),
    (compensation, "unpack", "dequantize"),
    (one_layer, "unpack", "dequantize"),
    (placed, "unpack", "dequantize"),
    (compensation, "plus_low_rank", "compensate: low-rank products"),
    (one_layer, "compensate", "compensate: least squares, errors"),
    (diagnostics, "update_survival", "diagnostics"),
    (one_layer, "add_low_rank", "compensate: low-rank products"),
    (one_layer.LayerMerge, "_carry_state", "Adam's moments"),
    (coordinator.MergeCoordinator, "finish", "everything else"),
]
PAPER_TOKENS = 131072  # a step


class Clock:
    """Own time of named functions.

    Args:
        wait: Called before each look at the clock: on a GPU, waits for it.
    """

    def __init__(self, wait: Callable[[], object] = lambda: None) -> None:
        self.times: Counter[str] = Counter()
        self._wait = wait
        self._inner: list[float] = []

    @contextmanager
    def watching(self, parts: list[tuple[Any, str, str]]) -> Iterator[None]:
        """Times all of these functions inside the block only."""
        originals = [(owner, name, getattr(owner, name)) for owner, name, _ in parts]
        for part in parts:
            self.watch(*part)
        try:
            yield
        finally:
            for owner, name, function in originals:
                setattr(owner, name, function)

    def watch(self, owner: Any, name: str, label: str) -> None:
        """Replaces a function by one that is timed."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._wait()
            started = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                self._wait()
                taken = time.perf_counter() - started
                self.times[label] += taken - self._inner.pop()
                if self._inner:
                    self._inner[-1] += taken

        setattr(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama_60m")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--micro_batch", type=int, default=8, help="sequences a pass")
    parser.add_argument("--merges", type=int, default=5)
    parser.add_argument("--oversampling", type=float, help="loqt.subspace.oversampling; default: the product's")
    parser.add_argument("--quick", action="store_true", help="a small shape; does not touch RESULTS.md")
    options = parser.parse_args()
    more = [f"--train.micro_batch_size={options.micro_batch}"]
    if options.oversampling is not None:
        more.append(f"--loqt.subspace.oversampling={options.oversampling}")
    options.seq_len = 256
    if options.quick:
        options.preset, options.rank, options.sequences, options.merges = "llama_micro", 32, 2, 1
    torch.set_num_threads(1)
    clock = Clock()
    for part in PARTS:
        clock.watch(*part)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of("loqt", "float32", options, folder, *more)
        merge_of(trainer, 0)()
        update(trainer, 1)
        steps, collecting, merging, found = [], [], [], []
        clock.times.clear()
        for index in range(1, options.merges + 1):
            steps += [seconds(lambda: update(trainer, 900)) for _ in range(2)]
            before = clock.times["factorise"]
            started = time.perf_counter()
            merge = merge_of(trainer, index)
            collecting.append(time.perf_counter() - started)
            found.append(clock.times["factorise"] - before)
            merging.append(seconds(merge))
    step = statistics.median(steps)
    sketch = statistics.median(collecting) - step - statistics.median(found)
    total = statistics.median(collecting) - step + statistics.median(merging)
    rows = [["sketch", f"{sketch:.3f}", f"{sketch / step:.3f}"]]
    for label, spent in clock.times.most_common():
        rows.append([label, f"{spent / options.merges:.3f}", f"{spent / options.merges / step:.3f}"])
    rows.append(["**all**", f"{total:.3f}", f"**{total / step:.3f}**"])
    tokens, title = options.sequences * options.seq_len, "What a merge costs"
    sketched, fixed = sketch / step, (total - sketch) / step * tokens / PAPER_TOKENS
    text = (
        f"{table(['part of a merge', 'seconds', 'in steps'], rows)}\n\n{options.preset}, rank {options.rank}, float32, "
        f"one thread, one process (nothing is communicated), steps of {tokens} tokens in passes of "
        f"{min(options.micro_batch, options.sequences)} sequences, {options.merges} merge(s)."
    )
    command = "python benchmarks/merge.py"
    if tokens == PAPER_TOKENS:
        title, command = f"{title}, the paper's batch", f"{command} --sequences 512 --merges {options.merges}"
    else:
        text += (
            " The sketch grows with the step, the rest does not: at the paper's 131072 tokens a step the same merge is "
            f"{sketched:.3f} + {fixed:.3f} = **{sketched + fixed:.3f} steps** (computed from the line above)."
        )
    publish(title, command, text, keep=not options.quick and options.oversampling is None)


if __name__ == "__main__":
    main()
