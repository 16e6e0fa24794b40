"""The part of benchmarks/gpu.py that says where a step's time goes, and what a fused kernel could save of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from common import table
from gpu_common import Place, Table, for_each, largest_pass, resize
from step_time import GROUPS, flops_by_operator, merge_of, operator_times, share_table, update

from loqt_scale.layers import loqt_layers
from loqt_scale.training.trainer import Trainer

DEQUANTIZE, LOW_RANK, PRODUCTS = "dequantize W and P", "low-rank term (fold or branch)", "matrix products"
# the layer's own operators first; in-place addmm is the low-rank term and nothing else
OURS = {"dequantize_4bit": DEQUANTIZE, "addmm_": LOW_RANK, **GROUPS}


@dataclass(frozen=True)
class Profile:
    """A step of one shape.

    Args:
        times: Microseconds by group.
        wall: Microseconds of the step, not profiled.
        product_flops: FLOPs of the matrix products, without the low-rank term and attention.
        fold_flops: FLOPs of the low-rank term.
        dense_bytes: Bytes of the dequantized weights that a step writes, in bfloat16: each forward and each backward.
        bandwidth: Bytes a second that the device copies at, read and written counted.
    """

    times: Counter[str]
    wall: float
    product_flops: int
    fold_flops: int
    dense_bytes: int
    bandwidth: float

    @property
    def overhead(self) -> float:
        """Microseconds of dequantizing and of the low-rank term beyond its FLOPs at the matrix products' rate."""
        rate = self.product_flops / max(1.0, self.times[PRODUCTS])
        return self.times[DEQUANTIZE] + self.times[LOW_RANK] - self.fold_flops / rate

    @property
    def total(self) -> float:
        """Microseconds of all groups."""
        return float(sum(self.times.values()))

    def verdict(self, preset: str) -> str:
        """The sentence that a decision for or against a kernel needs."""
        overhead, writing = self.overhead, self.dense_bytes / self.bandwidth * 1e6
        return (
            f"**{preset}: a fused dequantize-and-fold kernel could save at most {max(0.0, overhead) / self.total:.1%} "
            f"of a step's kernel time**, if it hid all of dequantizing ({self.times[DEQUANTIZE] / 1000:.2f} ms) and "
            f"all of the low-rank term ({self.times[LOW_RANK] / 1000:.2f} ms) but its FLOPs; "
            f"{max(0.0, overhead - writing) / self.total:.1%} if it still wrote each dense weight to memory once for "
            f"the product to read ({writing / 1000:.2f} ms at the {self.bandwidth / 1e12:.2f} TB/s that a copy reached "
            f"here). Kernels take {self.total / 1000:.2f} ms of the step's {self.wall / 1000:.2f} ms: the rest is the "
            "device waiting for the host."
        )


def profile(place: Place, repeats: int) -> Iterator[Table]:
    """Shares of a step's kernel time by group of operators, and the most that a fused kernel could save."""

    def measure(preset: str) -> Profile:
        one = profile_of(place, preset)
        print(one.verdict(preset), flush=True)
        return one

    for found in for_each(place, place.presets("llama_130m", "llama_350m", "llama_1b"), measure):
        yield place.title("GPU: where a step's time goes"), profile_tables(place, found)


def profile_tables(place: Place, found: dict[str, Profile]) -> str:
    """Verdicts, shares by group, rates of the products."""
    columns = {
        preset: [(group, time / one.total) for group, time in one.times.most_common()] for preset, one in found.items()
    }
    rows = [
        [
            preset,
            f"{one.product_flops / one.times[PRODUCTS] / 1e6:.0f}",
            f"{one.fold_flops / one.times[LOW_RANK] / 1e6:.0f}",
        ]
        for preset, one in found.items()
        if one.times[PRODUCTS] and one.times[LOW_RANK]
    ]
    rates = table(["model", "matrix products, TFLOP/s", "low-rank term, TFLOP/s"], rows)
    verdicts = "\n\n".join(one.verdict(preset) for preset, one in found.items())
    return (
        f"{verdicts}\n\n{share_table(columns)}\n\n{rates}\n\n{place.notes()} One step of one pass, the largest power "
        "of two of sequences up to 128 that fits, blocks not compiled; the time of kernels, by the operator that "
        "started them."
    )


def profile_of(place: Place, preset: str) -> Profile:
    """Measures a shape."""
    trainer = place.trainer(preset, "--loqt.merge.gap=100")
    merge_of(trainer, 0)()
    sequences = largest_pass(place, [(trainer, trainer.update)])
    resize(trainer, sequences=sequences, passes=1)
    flops = flops_by_operator(trainer)
    fold = flops.get(torch.ops.aten.addmm_, 0)
    products = sum(flops.get(operator, 0) for operator in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm))

    def work() -> None:
        update(trainer, 901)
        place.wait()

    work()
    wall = min(place.seconds(work) for _ in range(3)) * 1e6
    times = operator_times(work, OURS, cuda=place.cuda)
    return Profile(times, wall, products, fold, dense_bytes(trainer), copy_bandwidth(place))


def dense_bytes(trainer: Trainer) -> int:
    """Bytes of dequantized weights that a step writes: forward, backward, and once more where blocks are recomputed."""
    values = sum(layer.spec.base.rows * layer.spec.base.cols for _, layer in loqt_layers(trainer.built.model))
    return 2 * values * (3 if trainer.config.model.activation_checkpointing else 2)


def copy_bandwidth(place: Place) -> float:
    """Bytes a second of a large copy on the device."""
    source = torch.zeros(2**20 if place.quick else 2**29, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = min(place.seconds(lambda: target.copy_(source)) for _ in range(5))
    return 2 * source.nbytes / seconds
