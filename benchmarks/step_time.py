"""How long a LoQT step takes beside a full-rank step, and where the time of steps and merges goes.

Both models live in one process and take turns, A B A B, so that what else the machine does hits both; the result is
the median over the pairs of time(loqt) / time(full). A step is forward, backward, clipping and AdamW.
A merge is timed apart and given in steps, since it comes once in a hundred or more. Ratios travel between machines,
seconds do not.

    python benchmarks/step_time.py --threads 2   # LLaMA 60M shape, float32 and bfloat16
    python benchmarks/step_time.py --quick       # a small shape, to see that it runs
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import TypeVar

from common import ROOT, publish, table

sys.path.insert(0, str(ROOT))

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from loqt_scale.config.yaml import parse_run_config
from loqt_scale.functional.operator_flops import FORMULAS
from loqt_scale.training.trainer import Trainer
from tests.distributed.footprint_tasks import make_trainer, update_without_merge

Variant = TypeVar("Variant", bound=Hashable)
Measure = TypeVar("Measure")
METHODS = ("loqt", "full")
RANKS = {"llama_micro": 32, "llama_60m": 128, "llama_130m": 256, "llama_350m": 256}
# operator -> group; looked up by the first fragment that its name contains
GROUPS = {
    "quantize_4bit": "(de)quantize",
    "bucketize": "(de)quantize",
    "scaled_dot_product": "attention",
    "flash_attention": "attention",
    "addmm": "matrix products",
    "bmm": "matrix products",
    "::mm": "matrix products",
    "LowRankLinear": "Python of the layer and autograd",
    "autograd::engine": "Python of the layer and autograd",
    "vector_norm": "norms and clipping",
    "linalg": "factorisation (QR, SVD, Cholesky)",
    "svd": "factorisation (QR, SVD, Cholesky)",
    "geqrf": "factorisation (QR, SVD, Cholesky)",
    "orgqr": "factorisation (QR, SVD, Cholesky)",
    "cholesky": "factorisation (QR, SVD, Cholesky)",
    "eigh": "factorisation (QR, SVD, Cholesky)",
    "adam": "optimizer",
    "randn": "random numbers",
    "normal_": "random numbers",
    "softmax": "softmax, loss",
    "nll_loss": "softmax, loss",
    "embedding": "embedding",
    "norm": "norms and clipping",
    "copy_": "copies and casts",
    "cat": "copies and casts",
    "clone": "copies and casts",
    "sum": "elementwise and sums",
    "mul": "elementwise and sums",
    "add": "elementwise and sums",
    "sub": "elementwise and sums",
    "silu": "elementwise and sums",
    "pow": "elementwise and sums",
    "zero_": "elementwise and sums",
    "fill_": "elementwise and sums",
}


def trainer_of(method: str, dtype: str, options: argparse.Namespace, folder: str, *more: str) -> Trainer:
    """A trainer in one process; `more` are further settings."""
    words = [f"--method={method}", f"--model.dtype={dtype}", f"--model.preset={options.preset}"]
    words += [f"--loqt.rank={options.rank}", "--loqt.merge.gap=1", "--data.tokenizer=bytes"]
    words += [f"--data.seq_len={options.seq_len}", "--data.max_eval_sequences=2", "--train.steps=1000"]
    words += [f"--train.global_batch_size={options.sequences}", f"--train.micro_batch_size={options.sequences}"]
    words += ["--optim.lr=1e-3", "--parallel.strategy=single", f"--train.run_dir={Path(folder) / 'run'}"]
    return make_trainer(parse_run_config([*words, "--train.progress=off", *more]))


def update(trainer: Trainer, step: int) -> None:
    """A normal step: the same without probes."""
    trainer.accumulate(step)
    trainer.update()


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_turns(
    variants: Sequence[Variant], repeats: int, work: Callable[[Variant, int], object]
) -> dict[Variant, list[float]]:
    """Wall times of `work(variant, turn)` for all variants in turns."""
    return measured_in_turns(variants, repeats, lambda variant, turn: seconds(partial(work, variant, turn)))


def measured_in_turns(
    variants: Sequence[Variant], repeats: int, measure: Callable[[Variant, int], Measure]
) -> dict[Variant, list[Measure]]:
    """`measure(variant, turn)` of all variants in turns, A B B A: what else the machine does hits all."""
    found: dict[Variant, list[Measure]] = {variant: [] for variant in variants}
    for turn in range(repeats):
        for variant in variants if turn % 2 == 0 else variants[::-1]:
            found[variant].append(measure(variant, turn))
    return found


def count_flops(trainer: Trainer) -> int:
    """FLOPs of a normal step's matrix products and attention, as torch counts them."""
    return sum(flops_by_operator(trainer).values())


def flops_by_operator(trainer: Trainer) -> dict[object, int]:
    """The same, by operator."""
    with FlopCounterMode(display=False, custom_mapping=dict(FORMULAS)) as counter:
        update(trainer, 900)
    return counter.get_flop_counts()["Global"]


def merge_of(trainer: Trainer, index: int) -> Callable[[], object]:
    """The merge after the index-th merge step, which this call runs up to it."""
    assert trainer.merges is not None
    merges, step = trainer.merges, trainer.merges.steps[index]
    update_without_merge(trainer, step)
    return lambda: merges.finish(step)


def op_groups(work: Callable[[], object], count: int) -> list[tuple[str, float]]:
    """(group, share of operators' own time) of the `count` largest groups."""
    times = operator_times(work, GROUPS)
    total = sum(times.values())
    return [(group, value / total) for group, value in times.most_common(count)]


def operator_times(work: Callable[[], object], groups: dict[str, str], *, cuda: bool = False) -> Counter[str]:
    """Operators' own microseconds by group, on the CPU or of the kernels that they start; quantizers own inner ops.

    Args:
        work: What is profiled; on CUDA it must wait for the device.
        groups: Fragment of an operator's name -> its group; the first that fits.
        cuda: Count the time of kernels.
    """
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        work()
    times: Counter[str] = Counter()
    for event in profiler.events() or ():
        if event.device_type != DeviceType.CPU:  # a kernel, which its operator counts already
            continue
        parent, name = event.cpu_parent, event.name
        while parent is not None:  # bitsandbytes' quantizer is made of torch operators
            if "quantize_4bit" in parent.name:
                name = parent.name
            parent = parent.cpu_parent
        group = next((group for fragment, group in groups.items() if fragment in name), "other")
        times[group] += event.self_device_time_total if cuda else event.self_cpu_time_total
    return times


def share_table(columns: dict[str, list[tuple[str, float]]]) -> str:
    """Groups by rows, pieces of work by columns."""
    names = list(dict.fromkeys(group for column in columns.values() for group, _ in column))
    rows = [[name, *(f"{dict(c)[name]:.0%}" if name in dict(c) else "-" for c in columns.values())] for name in names]
    return table(["share of operators' time", *columns], rows)


def compare(dtype: str, options: argparse.Namespace, folder: str) -> tuple[list[object], str]:
    """(row of times, table of shares) at one compute dtype."""
    trainers = {method: trainer_of(method, dtype, options, folder) for method in METHODS}
    merge_of(trainers["loqt"], 0)()  # before it P and B are zero
    for trainer in trainers.values():
        update(trainer, 1)  # warm-up
    times = in_turns(METHODS, options.repeats, lambda method, turn: update(trainers[method], 2 + turn))
    ratios = sorted(loqt / full for loqt, full in zip(times["loqt"], times["full"], strict=True))
    loqt, full = (statistics.median(times[method]) for method in METHODS)
    merges = [seconds(merge_of(trainers["loqt"], 1 + index)) for index in range(options.merges)]
    merge = statistics.median(merges)
    floor = count_flops(trainers["loqt"]) / count_flops(trainers["full"])
    row: list[object] = [options.preset, dtype, f"{full:.3f}", f"{loqt:.3f}", f"**{statistics.median(ratios):.3f}**"]
    row += [f"{ratios[0]:.3f} to {ratios[-1]:.3f}", f"{floor:.3f}", f"{merge:.2f}", f"{merge / loqt:.1f}"]
    columns = {
        f"{method} step": op_groups(lambda m=method: update(trainers[m], 900), options.groups)  # type: ignore[misc]
        for method in METHODS
    }
    columns["loqt merge"] = op_groups(merge_of(trainers["loqt"], 1 + options.merges), options.groups)
    return row, f"{options.preset}, {dtype}:\n\n{share_table(columns)}"


def step_parser(description: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """A parser of the settings that every benchmark of steps has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=8, help="sequences a step, in one micro-batch")
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds of all variants")
    parser.add_argument("--presets", nargs="+", default=["llama_60m", "llama_130m"], choices=RANKS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--quick", action="store_true", help="a small shape; does not touch RESULTS.md")
    return parser


def parse_options() -> argparse.Namespace:
    parser = step_parser(__doc__, repeats=9)
    parser.add_argument("--merges", type=int, default=3)
    parser.add_argument("--groups", type=int, default=8, help="rows of the tables of shares")
    options = parser.parse_args()
    if options.quick:
        options.presets, options.sequences, options.seq_len = ["llama_micro"], 2, 64
        options.repeats, options.merges = 3, 1
    return options


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    rows, shares = [], []
    with tempfile.TemporaryDirectory() as folder:
        for preset, dtype in product(options.presets, options.dtypes):
            options.preset, options.rank = preset, RANKS[preset]
            row, share = compare(dtype, options, folder)
            rows.append(row)
            shares.append(share)
            print(row, flush=True)
    header = ["model", "dtype", "full step, s", "loqt step, s", "loqt / full", "pairs from ... to"]
    header += ["FLOPs, loqt / full", "merge, s", "merge / step"]
    text = (
        f"{table(header, rows)}\n\nPaper's ranks, {options.sequences} sequences of "
        f"{options.seq_len} tokens, byte vocabulary (320), {options.threads} thread(s), {options.repeats} alternating "
        f"pairs.\n\n" + "\n\n".join(shares)
    )
    if options.quick:
        print(text)
        return
    command = f"python benchmarks/step_time.py --threads {options.threads} --sequences {options.sequences}"
    title = "Step time: LoQT against full-rank training"
    publish(title if options.sequences == 8 else f"{title}, {options.sequences} sequences a step", command, text)


if __name__ == "__main__":
    main()
