"""A matrix as packed bytes, which may be cut along dim 0 and sharded like any parameter.

A matrix (rows x cols) becomes two tensors of bytes: `codes` (nf4: two values a byte) and `scales` (one float32 for each
block of `block_size` values, viewed as bytes). They are bytes because sharding engines cast floats: mixed precision
would round scales, and rewrite codes that happen to be NaNs.

Blocks run along rows, one row after the other. If `cols` is a multiple of the block, every row holds whole blocks. If
not, some block begins in one row and ends in the next; a cut between these two rows would change both parts. So rows
are bound into *row groups*: the fewest rows that hold whole blocks together. Dim 0 of `codes` and `scales` counts them.

    cols 512,  block 64     512 = 8 blocks          a group is 1 row
    cols 1376, block 64    1376 = 21.5 blocks       a group is 2 rows, 43 blocks

Any cut along dim 0 then leaves parts that are quantized as the whole matrix is, bit for bit. That is why a rank can
merge its own rows alone. If the rows do not fill the last group, rows of zeros do.

What the bytes mean is the scheme's affair (`schemes`). Scheme `none` has no blocks: a group is a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loqt_scale.functional.schemes import SCHEMES, Scheme


@dataclass(frozen=True)
class MatrixLayout:
    """Where the values of a (rows x cols) matrix lie in its packed form.

    Args:
        rows: Rows of the dense matrix.
        cols: Columns of the dense matrix.
        scheme: A name in `schemes.SCHEMES`.
        block_size: Values per scale.
    """

    rows: int
    cols: int
    scheme: str
    block_size: int = 64

    @property
    def kind(self) -> Scheme:
        """The scheme itself."""
        return SCHEMES[self.scheme]

    @property
    def group_rows(self) -> int:
        """Rows that must stay together on one shard."""
        return 1 if self.kind.exact else self.block_size // math.gcd(self.cols, self.block_size)

    @property
    def groups(self) -> int:
        """Dim 0 of the packed tensors."""
        return -(-self.rows // self.group_rows)

    @property
    def group_values(self) -> int:
        """Values per group."""
        return self.group_rows * self.cols

    @property
    def codes_shape(self) -> tuple[int, int]:
        """(groups, bytes per group) of the uint8 codes."""
        return (self.groups, self.kind.code_bytes(self.group_values))

    @property
    def scales_shape(self) -> tuple[int, int] | None:
        """(groups, bytes per group) of the uint8 scales; None where the scheme has none."""
        count = self.kind.scale_bytes(self.group_values, self.block_size)
        return (self.groups, count) if count else None

    def rows_of_groups(self, start: int, stop: int) -> tuple[int, int]:
        """Dense rows [first, last) held by groups [start, stop)."""
        return min(start * self.group_rows, self.rows), min(stop * self.group_rows, self.rows)


def pack(dense_RC: Tensor, layout: MatrixLayout) -> tuple[Tensor, Tensor | None]:
    """Quantizes whole groups of rows.

    Args:
        dense_RC: Rows of the matrix, (n, cols), any float dtype; n is a whole number of groups, except at the matrix's
            end.
        layout: Layout of the whole matrix.

    Returns:
        codes (groups_n, bytes) uint8 and scales (groups_n, bytes) uint8; scales are None where the scheme has none.
    """
    rows = dense_RC.shape[0]
    groups = -(-rows // layout.group_rows)
    if groups == 0:  # a shard beyond the matrix's end
        empty = torch.empty(0, dtype=torch.uint8, device=dense_RC.device)
        scales_shape = layout.scales_shape
        return (
            empty.reshape(0, layout.codes_shape[1]),
            None if scales_shape is None else empty.reshape(0, scales_shape[1]),
        )
    padding = groups * layout.group_rows - rows
    values = torch.nn.functional.pad(dense_RC, (0, 0, 0, padding)) if padding else dense_RC
    values = values.to(torch.float32).contiguous().reshape(groups, layout.group_values)
    return layout.kind.pack(values, layout.block_size)


def unpack(
    codes: Tensor, scales: Tensor | None, layout: MatrixLayout, dtype: torch.dtype, rows: int | None = None
) -> Tensor:
    """Dequantizes groups of rows into a fresh dense tensor, which callers may add to in place.

    Args:
        codes: (groups_n, bytes) uint8.
        scales: (groups_n, bytes) uint8, or None.
        layout: Layout of the whole matrix.
        dtype: Dtype of the result; float64 is dequantized in float32 and widened.
        rows: Rows to return, fewer than the groups hold where the last group is padded. Default: all of `layout.rows`.

    Returns:
        (rows, cols) in `dtype`.
    """
    rows = layout.rows if rows is None else rows
    if codes.shape[0] == 0:
        return codes.new_empty((0, layout.cols), dtype=dtype)
    wide = dtype if dtype in (torch.float16, torch.bfloat16, torch.float32) else torch.float32
    dense = layout.kind.unpack(codes, scales, layout.block_size, layout.group_values, wide)
    dense = dense.reshape(-1, layout.cols)[:rows]
    return dense if wide == dtype else dense.to(dtype)
