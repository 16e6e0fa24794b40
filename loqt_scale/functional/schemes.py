"""How a block of values becomes bytes: the named quantization schemes, behind one interface.

    name         bits a value, blocks of 64   what is stored
    nf4          4 + 0.5                      NF4 codes (QLoRA, Dettmers et al. 2023), a float32 scale a block
    nf4_double   4 + about 0.14               the same codes; the scales of a row group as 8-bit numbers of their own
    fp4          4 + 0.5                      4-bit floats (bitsandbytes' code book), a float32 scale a block
    int8         8 + 0.5                      round(127 x / scale), a float32 scale a block
    none         32                           the float32 values: the paper's LoQT-nq

A scheme sees whole row groups (see `quantization`) as rows of values and never looks beyond one of them. So whatever
the scheme, a shard that holds whole groups is packed bit for bit as the whole matrix would be.

The 4-bit kernels are bitsandbytes' registered operators: they run on every device that it supports and trace under
torch.compile; everything else is plain torch.
"""

from __future__ import annotations

import logging
from typing import Protocol

import torch
from torch import Tensor

from loqt_scale.functional.nf4_cpu import quantize_nf4

# bitsandbytes warns, at import, of an optional CPU kernel for inference that nothing here uses
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit" not in record.getMessage())
import bitsandbytes  # noqa: E402, F401  (importing it registers torch.ops.bitsandbytes)

FLOAT_BYTES = 4  # float32
Packed = tuple[Tensor, Tensor | None]


class Scheme(Protocol):
    """One way to store values. Legend: G groups, V values a group, b values a block."""

    @property
    def exact(self) -> bool:
        """Whether unpacking gives back the very float32 values."""
        ...

    def floats(self, stored: Tensor) -> Tensor:
        """The floating-point numbers among the stored bytes: what may be NaN or infinite.

        Args:
            stored: uint8 (G, bytes) scales, or the codes where the scheme has none.

        Returns:
            float32 (G, n).
        """
        ...

    def code_bytes(self, values: int) -> int:
        """Bytes of the codes of a group of `values` values."""
        ...

    def scale_bytes(self, values: int, block: int) -> int:
        """Bytes of the scales of a group; 0 where there are none."""
        ...

    def pack(self, values_GV: Tensor, block: int) -> Packed:
        """float32 (G, V) to uint8 codes (G, `code_bytes`) and uint8 scales (G, `scale_bytes`) or None."""
        ...

    def unpack(self, codes: Tensor, scales: Tensor | None, block: int, values: int, dtype: torch.dtype) -> Tensor:
        """The values again: (G, V) in float32, or in a 16-bit `dtype`; a fresh tensor."""
        ...


class Float32:
    """Values as bytes: a float tensor of frozen weights would be rounded by a mixed-precision cast."""

    exact = True

    def floats(self, stored: Tensor) -> Tensor:
        return stored.view(torch.float32)

    def code_bytes(self, values: int) -> int:
        return values * FLOAT_BYTES

    def scale_bytes(self, values: int, block: int) -> int:
        return 0

    def pack(self, values_GV: Tensor, block: int) -> Packed:
        return values_GV.clone(memory_format=torch.contiguous_format).view(torch.uint8), None

    def unpack(self, codes: Tensor, scales: Tensor | None, block: int, values: int, dtype: torch.dtype) -> Tensor:
        return codes.view(torch.float32).to(dtype, copy=True)


class FourBit:
    """Two codes a byte.

    Args:
        book: Code book: `nf4` or `fp4`.
        double: Whether a group's scales are quantized too.
    """

    exact = False

    def __init__(self, book: str, *, double: bool = False) -> None:
        self.book, self.double = book, double

    def floats(self, stored: Tensor) -> Tensor:
        return self.scale_values(stored)

    def code_bytes(self, values: int) -> int:
        return values // 2

    def scale_bytes(self, values: int, block: int) -> int:
        count = values // block
        return 2 * FLOAT_BYTES + count if self.double else count * FLOAT_BYTES

    def pack(self, values_GV: Tensor, block: int) -> Packed:
        groups = values_GV.shape[0]
        table = self.book == "nf4" and values_GV.device.type == "cpu"
        packed = quantize_nf4(values_GV, block) if table else None
        codes, scales = packed or torch.ops.bitsandbytes.quantize_4bit(values_GV, block, self.book, torch.uint8)
        scales = scales.reshape(groups, -1)
        return codes.reshape(groups, -1), pack_scales(scales) if self.double else scales.view(torch.uint8)

    def scale_values(self, scales: Tensor) -> Tensor:
        """The scales of blocks, float32 (G, V / b), from their bytes."""
        return unpack_scales(scales) if self.double else scales.view(torch.float32)

    def unpack(self, codes: Tensor, scales: Tensor | None, block: int, values: int, dtype: torch.dtype) -> Tensor:
        assert scales is not None
        flat = self.scale_values(scales).reshape(-1).contiguous()  # the kernel reads as if all lay side by side
        column, shape = codes.reshape(-1, 1).contiguous(), (codes.shape[0], values)
        dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit(column, flat, block, self.book, shape, dtype)
        return dense


class Int8:
    """Symmetric 8-bit integers; the byte holds round(127 x / scale) + 128."""

    exact = False

    def floats(self, stored: Tensor) -> Tensor:
        return stored.view(torch.float32)

    def code_bytes(self, values: int) -> int:
        return values

    def scale_bytes(self, values: int, block: int) -> int:
        return values // block * FLOAT_BYTES

    def pack(self, values_GV: Tensor, block: int) -> Packed:
        blocks = values_GV.reshape(values_GV.shape[0], -1, block)
        scales = blocks.abs().amax(dim=2)
        codes = (blocks * (127.0 / scales.clamp_min(1e-38)).unsqueeze(2)).round_().add_(128.0).to(torch.uint8)
        return codes.reshape(values_GV.shape), scales.view(torch.uint8)

    def unpack(self, codes: Tensor, scales: Tensor | None, block: int, values: int, dtype: torch.dtype) -> Tensor:
        assert scales is not None
        steps = scales.view(torch.float32).div(127.0).unsqueeze(2)
        blocks = codes.reshape(codes.shape[0], -1, block).to(torch.float32).sub_(128.0).mul_(steps)
        return blocks.reshape(codes.shape).to(dtype)


SCHEMES: dict[str, Scheme] = {
    "nf4": FourBit("nf4"),
    "nf4_double": FourBit("nf4", double=True),
    "fp4": FourBit("fp4"),
    "int8": Int8(),
    "none": Float32(),
}


def pack_scales(scales_GN: Tensor) -> Tensor:
    """Double quantization: a group's scales as 8-bit steps between its least and its greatest.

    QLoRA quantizes the scales of 256 blocks together, less their mean. A row group's own range serves as well (scales
    of one row differ by little), and keeps a group self-contained, which is what makes merges local to a shard.

    Returns:
        uint8 (G, 8 + N): least scale and step as float32 bytes, then the codes.
    """
    least, greatest = scales_GN.aminmax(dim=1, keepdim=True)
    step = (greatest - least) / 255.0
    codes = ((scales_GN - least) / step.clamp_min(1e-38)).round_().clamp_(0.0, 255.0).to(torch.uint8)
    return torch.cat([torch.cat([least, step], dim=1).view(torch.uint8), codes], dim=1)


def unpack_scales(packed: Tensor) -> Tensor:
    """float32 (G, N) from the bytes of `pack_scales`."""
    head = packed[:, : 2 * FLOAT_BYTES].clone(memory_format=torch.contiguous_format)  # a view needs strides of 4 bytes
    least, step = head.view(torch.float32).split(1, dim=1)
    return packed[:, 2 * FLOAT_BYTES :].to(torch.float32) * step + least
