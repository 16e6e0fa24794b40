"""8-bit codes for the optimizer's moments, in blocks that never leave a row.

A block's values are divided by its greatest magnitude and rounded to the nearest of 256 levels, which are dense near
zero (dynamic 8-bit quantization, Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"). Libraries run
their blocks along the flattened tensor; ours end with the row, so that any cut by rows, on any number of ranks, leaves
the same codes. Two more properties that the run relies on:

* encode(decode(codes)) = codes: both 1 and -1 are levels, so a block's scale survives. A checkpoint in float32
  therefore loses nothing.
* the second moment is kept as its square root, whose range is half as many decades: no value that matters becomes zero
  (its inverse root is what an update is multiplied by).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from loqt_scale.functional.defaults import plain_defaults


class Run(NamedTuple):
    """Values [start, stop) of a fragment in blocks of `block` values; 0: in none."""

    start: int
    stop: int
    block: int


def block_runs(first: int, values: int, block: int) -> list[Run]:
    """Cuts consecutive values of a matrix, row by row, into its blocks and what is left of those at either end.

    A block that a fragment holds in part is a block of its own there: nothing else changes with the cut.

    Args:
        first: Index of the first value in the matrix.
        values: How many there are.
        block: Values of a block, a divisor of a row; 0 for none.

    Returns:
        One run of whole blocks, and at most one cut block before and after it; indices count from `first`.
    """
    if not block:
        bounds = [(0, values, 0)]
    else:
        head = min(-first % block, values)
        tail = (values - head) % block
        bounds = [(0, head, head), (head, values - tail, block), (values - tail, values, tail)]
    return [Run(*bound) for bound in bounds if bound[0] < bound[1]]


def encode(values_RC: Tensor, block: int, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantizes rows.

    Args:
        values_RC: float32; not negative unless `signed`.
        block: Values of a block, a divisor of C.
        signed: Which levels.

    Returns:
        codes (R, C) uint8 and scales (R, C / block) float32.
    """
    rows, columns = values_RC.shape
    codes, scales = encode_blocks(values_RC.reshape(-1, block), level_tables(signed, values_RC.device)[1])
    return codes.reshape(values_RC.shape), scales.reshape(rows, columns // block)


def decode(codes_RC: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """float32 (R, C) from what `encode` returned."""
    blocks = codes_RC.reshape(-1, codes_RC.shape[1] // scales.shape[1])
    return decode_blocks(blocks, scales.reshape(-1), level_tables(signed, codes_RC.device)[0]).reshape(codes_RC.shape)


def encode_blocks(values: Tensor, midpoints: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes blocks: (N, block) float32 to codes of that shape and scales (N,). `midpoints`: of `level_tables`."""
    scales = values.abs().amax(dim=1)
    unit = values / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    if torch.compiler.is_compiling():
        return _search(unit, midpoints).to(torch.uint8), scales
    return torch.bucketize(unit, midpoints, out_int32=True).to(torch.uint8), scales


def decode_blocks(codes: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """float32 (N, block) from codes of that shape and scales (N,). `levels`: of `level_tables`."""
    unit = levels.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)
    return unit * scales.unsqueeze(1)


def _search(unit: Tensor, midpoints: Tensor) -> Tensor:
    """`torch.bucketize` by eight comparisons a value, which compile into the kernel around them; int32.

    How many midpoints are smaller than a value: all of them than NaN, as there.
    """
    smaller = torch.zeros_like(unit, dtype=torch.int32)
    for half in (128, 64, 32, 16, 8, 4, 2, 1):
        smaller = smaller + torch.where(unit <= midpoints[smaller + (half - 1)], 0, half)
    return smaller


@cache
@plain_defaults()
def level_tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """(256 levels in [-1, 1] or [0, 1], ascending; the 255 midpoints between them), float32."""
    from bitsandbytes.functional import create_dynamic_map  # late: schemes.py has its first import speak less

    levels = create_dynamic_map(signed=signed).float().sort().values
    if signed:
        levels[0] = -1.0  # bitsandbytes' least is -0.993
    return levels.to(device), ((levels[1:] + levels[:-1]) / 2).to(device)
