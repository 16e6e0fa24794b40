"""A frozen matrix held as packed parameters: the base weight W_q and the projection P of a LoQT layer.

Both tensors are `nn.Parameter`s with `requires_grad=False`, not buffers: parameters are what FSDP2 and ZeRO shard and
gather; buffers would be replicated.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loqt_scale.functional.quantization import MatrixLayout, pack, unpack


class FrozenMatrix(nn.Module):
    """A (rows x cols) matrix in its packed form. See `functional.quantization` for the layout.

    Args:
        layout: How the matrix is packed.
        device: Where its storage lives; `meta` allocates nothing.

    Attributes:
        codes: uint8 (groups, bytes per group).
        scales: uint8 (groups, bytes per group), or None under scheme `none`.
    """

    codes: nn.Parameter
    scales: nn.Parameter | None

    def __init__(self, layout: MatrixLayout, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.layout = layout
        codes = torch.zeros(layout.codes_shape, dtype=torch.uint8, device=device)
        self.codes = nn.Parameter(codes, requires_grad=False)
        if layout.scales_shape is None:
            self.register_parameter("scales", None)
        else:
            scales = torch.zeros(layout.scales_shape, dtype=torch.uint8, device=device)
            self.scales = nn.Parameter(scales, requires_grad=False)

    @torch.no_grad()
    def store(self, dense_RC: Tensor) -> None:
        """Packs a whole (rows, cols) matrix into this module's unsharded parameters, in place."""
        codes, scales = pack(dense_RC, self.layout)
        self.codes.copy_(codes)
        if self.scales is not None and scales is not None:
            self.scales.copy_(scales)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantized matrix (rows, cols), a fresh tensor. Only where the parameters are unsharded."""
        return unpack(self.codes, self.scales, self.layout, dtype)

    def extra_repr(self) -> str:
        layout = self.layout
        return f"{layout.rows} x {layout.cols}, {layout.scheme}, block {layout.block_size}"
