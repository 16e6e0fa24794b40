"""Seconds to quantize a matrix to NF4 on one CPU thread: the table against bitsandbytes, alternating, the same bits.

python benchmarks/quantize.py       # seconds
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from common import publish, table

from loqt_scale.functional.nf4_cpu import quantize_nf4

BLOCK = 64
SHAPES = [(512, 512), (1376, 512), (2048, 768), (11008, 4096)]
TURNS = 15


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for shape in SHAPES:
        values = torch.randn(shape)
        ways = [
            partial(torch.ops.bitsandbytes.quantize_4bit, values, BLOCK, "nf4", torch.uint8),
            partial(quantize_nf4, values, BLOCK),
        ]
        results = [way() for way in ways]
        same = all(torch.equal(a.reshape(-1), b.reshape(-1)) for a, b in zip(*results, strict=True))
        assert same, "other codes"
        times: list[list[float]] = [[], []]
        for _ in range(TURNS if values.numel() < 2**22 else 5):
            for index, way in enumerate(ways):
                times[index].append(seconds(way))
        ratios = sorted(table_time / theirs for theirs, table_time in zip(*times, strict=True))
        ratio = f"**{median(ratios):.3f}** ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        rows.append([f"{shape[0]} x {shape[1]}", *(f"{1000 * median(t):.2f}" for t in times), ratio])
    header = ["matrix", "bitsandbytes, ms", "table, ms", "table / bitsandbytes"]
    text = table(header, rows) + f"\n\nfloat32, blocks of {BLOCK}, one thread, alternating; the same bits."
    publish("NF4 on the CPU", "python benchmarks/quantize.py", text)


if __name__ == "__main__":
    main()
