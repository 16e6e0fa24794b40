"""The part of a parameter that a rank stores, and the optimizer's moments of it in 8 bits or in 32.

    fsdp, ddp, single   whole rows, in a tensor of their own
    ZeRO                any consecutive values, inside a flat tensor that holds many parameters' (see `zero.flat`)

Both are a `Fragment`: one kind of update and one kind of moment serve all strategies.

8-bit moments have one scale for each block of values, and blocks are counted from the beginning of the parameter's
row, not of the fragment. A fragment of ZeRO may begin or end inside a block. That block's values then lie on two ranks,
and each rank has a scale for its own part:

    parameter   | block 0 | block 1 | block 2 | block 3 |
    rank 0      |=========|====                               scales: 0, first part of 1
    rank 1                     =====|=========|=========|     scales: second part of 1, 2, 3

So all other blocks have the codes that they would have on one rank; at most two blocks of a fragment differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loqt_scale.config import OptimizerStates
from loqt_scale.config.blocks import row_block
from loqt_scale.functional.blockwise import block_runs, decode_blocks, encode_blocks, level_tables

Root = Callable[[Tensor], Tensor]

CHUNK_VALUES = 2**18  # values in flight: a dozen buffers of 1 MiB, which a CPU's cache holds in part
DEVICE_CHUNK_VALUES = 2**22  # elsewhere, where launching some forty kernels a chunk is what costs


@dataclass(frozen=True, kw_only=True, eq=False)
class Fragment:
    """Consecutive values of a parameter, row by row.

    Args:
        parameter: The parameter.
        at: Index of the first of them in the tensor that holds them, flattened.
        first: Its index in the whole parameter.
        values: How many; 0 where other ranks hold all of the parameter.
        columns: Values of one row of the parameter.
        rows: Rows of the whole parameter.
    """

    parameter: Tensor
    at: int = 0
    first: int
    values: int
    columns: int
    rows: int

    def within(self, tensor: Tensor) -> Tensor:
        """These values of a flat tensor that holds them; shares its memory."""
        return tensor[self.at : self.at + self.values]

    @property
    def covering_rows(self) -> tuple[int, int]:
        """Rows [start, stop) of the parameter that hold all of these values, and others at either end."""
        return self.first // self.columns, -(-(self.first + self.values) // self.columns)

    def within_rows(self, rows: Tensor) -> Tensor:
        """These values of the `covering_rows`, a contiguous tensor; shares its memory."""
        first = self.first % self.columns
        return rows.view(-1)[first : first + self.values]

    def within_whole(self, tensor: Tensor) -> Tensor:
        """These values of a contiguous tensor shaped as the whole parameter; shares its memory."""
        return tensor.view(-1)[self.first : self.first + self.values]


class Chunk(NamedTuple):
    """Values [start, stop) of a fragment, whole blocks of `block` values, the first of which has scale `scale`."""

    start: int
    stop: int
    block: int
    scale: int

    def within(self, values: Tensor) -> Tensor:
        """These values of the fragment's, (V,), as blocks, or as they lie if there are none; shares their memory."""
        chunk = values[self.start : self.stop]
        return chunk.view(-1, self.block) if self.block else chunk


class Stored(NamedTuple):
    """A chunk of a moment as it is kept, to be replaced in place.

    Args:
        values: float32 (V,), or codes (N, block) uint8.
        scales: (N,) float32; None: the values are float32.
        levels: (256,) float32, what codes mean.
        midpoints: (255,) float32, between the levels.
        signed: True for the first moment; the second, never negative, is kept as its square root in 8 bits.
    """

    values: Tensor
    scales: Tensor | None
    levels: Tensor | None
    midpoints: Tensor | None
    signed: bool

    def load(self, *, copy: bool = False) -> Tensor:
        """The values, float32, shaped as they are kept; may share their memory unless `copy`."""
        if self.scales is None or self.levels is None:
            return self.values.clone() if copy else self.values
        values = decode_blocks(self.values, self.scales, self.levels)
        return values if self.signed else values.square_()

    def store(self, values: Tensor, skip: Tensor | None = None, *, root: Root = torch.sqrt) -> None:
        """Replaces the values, unless `skip`, a bool scalar on their device, says that they stay.

        Args:
            values: float32, shaped as `load` returned them.
            skip: See `replace_unless`.
            root: Takes square roots.
        """
        if self.scales is None or self.midpoints is None:
            replace_unless(skip, self.values, values)
            return
        codes, scales = encode_blocks(values if self.signed else root(values), self.midpoints)
        replace_unless(skip, self.values, codes)
        replace_unless(skip, self.scales, scales)


def chunk_values(device_type: str) -> int:
    """Values that an update has in flight at a time."""
    return CHUNK_VALUES if device_type == "cpu" else DEVICE_CHUNK_VALUES


class Moment:
    """One of the optimizer's moments of a fragment, zero at first.

    Args:
        fragment: Of what.
        kind: `int8` keeps codes where a row can be cut into blocks, else float32.
        signed: True for the first moment; the second, never negative, is kept as its square root.
        device: Where the values are.
    """

    def __init__(self, fragment: Fragment, kind: OptimizerStates, *, signed: bool, device: torch.device) -> None:
        self._signed = signed
        block = row_block(fragment.columns) if kind == "int8" else 0
        self._runs = block_runs(fragment.first, fragment.values, block)
        dtype = torch.uint8 if block else torch.float32
        self._values = torch.zeros(fragment.values, dtype=dtype, device=device)
        self._scales: Tensor | None = None
        if block:
            blocks = sum((run.stop - run.start) // run.block for run in self._runs)
            self._scales = torch.zeros(blocks, dtype=torch.float32, device=device)

    def tensors(self) -> list[Tensor]:
        """What is stored."""
        return [self._values] if self._scales is None else [self._values, self._scales]

    def chunks(self) -> Iterator[Chunk]:
        """All values in order, at most about `chunk_values` at a time."""
        most = chunk_values(self._values.device.type)
        scale = 0
        for run in self._runs:
            unit = max(1, run.block)
            size = max(1, most // unit) * unit
            for start in range(run.start, run.stop, size):
                stop = min(start + size, run.stop)
                yield Chunk(start, stop, run.block, scale)
                scale += (stop - start) // unit

    def stored(self, chunk: Chunk) -> Stored:
        """A chunk as it is kept; shares this moment's memory."""
        values = chunk.within(self._values)
        if self._scales is None:
            return Stored(values, None, None, None, self._signed)
        scales = self._scales[chunk.scale : chunk.scale + values.shape[0]]
        levels, midpoints = level_tables(self._signed, values.device)
        return Stored(values, scales, levels, midpoints, self._signed)

    def read(self, into: Tensor) -> None:
        """Copies all values into a contiguous float32 tensor of as many, of any shape, on any device."""
        for chunk in self.chunks():
            into.view(-1)[chunk.start : chunk.stop].copy_(self.stored(chunk).load().view(-1))

    def write(self, values: Tensor) -> None:
        """Replaces all values by those of a contiguous float32 tensor."""
        for chunk in self.chunks():
            self.stored(chunk).store(chunk.within(values.view(-1)).to(self._values.device))


def replace_unless(skip: Tensor | None, old: Tensor, new: Tensor) -> None:
    """Overwrites `old` by `new`, of the same shape and dtype, unless `skip`, a bool scalar; None never skips."""
    if skip is None:
        old.copy_(new)
    else:
        torch.where(skip, old, new, out=old)
