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
    blocks = values_RC.reshape(rows, columns // block, block)
    scales = blocks.abs().amax(dim=2)
    unit = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(2)
    _, midpoints = _tables(signed, values_RC.device)
    codes = torch.bucketize(unit, midpoints, out_int32=True).to(torch.uint8)
    return codes.reshape(values_RC.shape), scales


def decode(codes_RC: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """float32 (R, C) from what `encode` returned."""
    levels, _ = _tables(signed, codes_RC.device)
    rows, blocks = scales.shape
    unit = levels.index_select(0, codes_RC.reshape(-1).to(torch.int32)).reshape(
        rows, blocks, codes_RC.shape[1] // blocks
    )
    return (unit * scales.unsqueeze(2)).reshape(codes_RC.shape)


@cache
@plain_defaults()
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """(256 levels in [-1, 1] or [0, 1], ascending; the 255 midpoints), float32."""
    from bitsandbytes.functional import create_dynamic_map  # late: schemes.py has its first import speak less

    levels = create_dynamic_map(signed=signed).float().sort().values
    if signed:
        levels[0] = -1.0  # bitsandbytes' least is -0.993
    return levels.to(device), ((levels[1:] + levels[:-1]) / 2).to(device)
