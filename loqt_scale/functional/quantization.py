"""Packing a matrix into 4-bit codes that can be sharded, cast-proof, by rows.

A matrix (rows x cols) is stored as two byte tensors, `codes` (two NF4 values a byte) and `scales` (one float32 per
block of `block_size` values, *viewed as uint8*). Bytes are what every sharding engine leaves alone: a float tensor of
scales would be rounded by a mixed-precision cast, a float view of the codes would have its NaNs rewritten.

Blocks run along rows. When `cols` is not a multiple of the block, a block crosses a row end, so rows are bound into
*groups*: the fewest rows whose values fill whole blocks (cols 512 -> 1 row; cols 1376, block 64 -> 2 rows). Dim 0 of
`codes` and `scales` counts groups. Any cut along dim 0 therefore leaves each part quantizable by itself, bit for bit as
the whole: this is what makes a merge local to a shard. The last group is padded with zero rows.

Scheme `none` keeps the matrix's float32 values, as bytes too (a mixed-precision cast would round a frozen weight that
merges rely on); group = row.

Equation: W[i] = NF4_TABLE[code_i] * scale_{block(i)} (QLoRA, Dettmers et al. 2023, section 3). The kernels are
bitsandbytes' registered operators, so they run on every device it supports and trace under torch.compile.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loqt_scale.functional.nf4_cpu import quantize_nf4

# bitsandbytes warns, at import, of an optional CPU kernel for inference that nothing here uses
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit" not in record.getMessage())
import bitsandbytes  # noqa: E402, F401  (importing it registers torch.ops.bitsandbytes)

Scheme = Literal["nf4", "none"]
SCALE_BYTES = VALUE_BYTES = 4  # float32


@dataclass(frozen=True)
class MatrixLayout:
    """Where the values of a (rows x cols) matrix lie in its packed form.

    Args:
        rows: Rows of the dense matrix.
        cols: Columns of the dense matrix.
        scheme: `nf4` or `none`.
        block_size: Values per scale (`nf4`).
    """

    rows: int
    cols: int
    scheme: Scheme
    block_size: int = 64

    @property
    def group_rows(self) -> int:
        """Rows that must stay together on one shard."""
        return 1 if self.scheme == "none" else self.block_size // math.gcd(self.cols, self.block_size)

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
        return (self.groups, self.group_values * VALUE_BYTES if self.scheme == "none" else self.group_values // 2)

    @property
    def scales_shape(self) -> tuple[int, int] | None:
        """(groups, bytes per group) of the uint8 scales; None under `none`."""
        if self.scheme == "none":
            return None
        return (self.groups, self.group_values // self.block_size * SCALE_BYTES)

    def rows_of_groups(self, start: int, stop: int) -> tuple[int, int]:
        """Dense rows [first, last) held by groups [start, stop)."""
        return min(start * self.group_rows, self.rows), min(stop * self.group_rows, self.rows)


def pack(dense_RC: Tensor, layout: MatrixLayout) -> tuple[Tensor, Tensor | None]:
    """Quantizes whole groups of rows.

    Args:
        dense_RC: Rows of the matrix, (n, cols), any float dtype; n is a whole number of groups, except at the
        matrix's end. layout: Layout of the whole matrix.

    Returns:
        codes (groups_n, bytes) uint8 and scales (groups_n, bytes) uint8; scales are None under `none`.
    """
    if layout.scheme == "none":
        values = dense_RC.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return values.view(torch.uint8), None
    rows = dense_RC.shape[0]
    groups = -(-rows // layout.group_rows)
    codes_shape, scales_shape = layout.codes_shape, layout.scales_shape
    assert scales_shape is not None
    if groups == 0:  # a shard beyond the matrix's end
        empty = torch.empty(0, dtype=torch.uint8, device=dense_RC.device)
        return empty.reshape(0, codes_shape[1]), empty.reshape(0, scales_shape[1])
    padding = groups * layout.group_rows - rows
    values = torch.nn.functional.pad(dense_RC, (0, 0, 0, padding)) if padding else dense_RC
    values = values.to(torch.float32).contiguous()
    packed = quantize_nf4(values, layout.block_size) if values.device.type == "cpu" else None
    codes, scales = packed or torch.ops.bitsandbytes.quantize_4bit(
        values, layout.block_size, layout.scheme, torch.uint8
    )
    return codes.reshape(groups, codes_shape[1]), scales.view(torch.uint8).reshape(groups, scales_shape[1])


def unpack(
    codes: Tensor, scales: Tensor | None, layout: MatrixLayout, dtype: torch.dtype, rows: int | None = None
) -> Tensor:
    """Dequantizes groups of rows into a fresh dense tensor.

    Args:
        codes: (groups_n, bytes) uint8.
        scales: (groups_n, bytes) uint8, or None.
        layout: Layout of the whole matrix.
        dtype: Dtype of the result; float64 is dequantized in float32 and widened.
        rows: Rows to return, fewer than the groups hold where the last group is padded. Default: all of `layout.rows`.

    Returns:
        (rows, cols) in `dtype`. Under `none` a copy, so that callers may add to it in place.
    """
    rows = layout.rows if rows is None else rows
    if layout.scheme == "none":
        return codes.view(torch.float32).to(dtype, copy=True)
    assert scales is not None
    if codes.shape[0] == 0:
        return codes.new_empty((0, layout.cols), dtype=dtype)
    wide = dtype if dtype in (torch.float16, torch.bfloat16, torch.float32) else torch.float32
    dense = torch.ops.bitsandbytes.dequantize_4bit(
        codes.reshape(-1, 1),
        scales.reshape(-1).view(torch.float32),
        layout.block_size,
        layout.scheme,
        (codes.shape[0], layout.group_values),
        wide,
    )
    dense = dense.reshape(-1, layout.cols)[:rows]
    return dense if wide == dtype else dense.to(dtype)
