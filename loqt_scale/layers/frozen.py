"""A frozen matrix held as packed parameters: the base weight W_q and the projection P of a LoQT layer.

Both tensors are `nn.Parameter`s with `requires_grad=False`, not buffers: parameters are what FSDP2 and ZeRO shard and
gather; buffers would be replicated.
"""

from __future__ import annotations

from typing import Any

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

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """As `nn.Module` does, of bytes only: averages of several state dicts' bytes are floating-point numbers."""
        for name in ("codes", "scales"):
            found = state_dict.get(prefix + name)
            if isinstance(found, Tensor) and found.dtype != torch.uint8:
                lists[-1].append(
                    f"{prefix}{name} are packed bytes (torch.uint8), but the state dict has {found.dtype}: bytes "
                    "cannot be averaged or cast. Average the state dicts of to_dense(model)"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

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
