"""LoQTLinear: a linear layer with a quantized, frozen base and one trainable low-rank factor.

The layer knows no ranks, steps or schedules. `forward` reads its packed tensors and, on the rare steps on which a merge
follows, a `GradientProbe` that the merge coordinator has attached; everything else happens in
`functional.low_rank_linear`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loqt_scale.config import LoQTConfig, Side
from loqt_scale.errors import UserError
from loqt_scale.functional.low_rank_linear import (
    OTHER_SIDE,
    LowRankLinear,
    LowRankSpec,
    effective_weight,
    resolve_side,
)
from loqt_scale.functional.quantization import MatrixLayout
from loqt_scale.layers.frozen import FrozenMatrix
from loqt_scale.layers.weight import LazyWeight, dense_weight


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D` (GPT-2): a linear layer whose weight is stored (I, O)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


@dataclass
class GradientProbe:
    """Collects a weight gradient, dense or sketched, in `leaf.grad` while it is attached to a layer.

    Args:
        leaf: Leaf tensor whose *gradient* is wanted; its values are never read. (O, I) dense, or (F, l) sketched.
        omega: The sketch's test matrix, (O, l) on side input, (I, l) on side output; None collects the dense gradient.
    """

    leaf: Tensor
    omega: Tensor | None

    @classmethod
    def collecting(cls, shape: tuple[int, int], omega: Tensor | None, device: torch.device) -> GradientProbe:
        """A probe whose leaf takes no memory of its own (stride 0)."""
        leaf = torch.zeros((), dtype=torch.float32, device=device).expand(shape).detach().requires_grad_()
        return cls(leaf=leaf, omega=omega)


class LoQTLinear(nn.Module):
    """y = x (dequant(W_q) + s L(B))^T + bias; see `functional.low_rank_linear` for L and the gradients.

    Args:
        in_features: I.
        out_features: O.
        bias: Whether a (full-precision, trained) bias is added.
        config: Rank, scale, side and storage.
        rank: r; default: `config.rank`.
        device: Where parameters live; `meta` allocates nothing.
        dtype: Dtype of `factor` and `bias`.
        transposed: Whether the weight is stored (I, O), as transformers' `Conv1D` has it; checkpoints and exports then
            have it so too.

    Raises:
        ValueError: The rank exceeds the smaller side.

    Attributes:
        base: W_q, a FrozenMatrix (O x I).
        projection: P, a FrozenMatrix (F x r), F = I on side input, O on side output. Zero until the first merge, or
            until a start that makes up for quantization (`loqt.init`).
        factor: B, trainable, (O, r) on side input, (I, r) on side output: always rows x rank, so that it shards like
            its layer and the optimizer's state rotates from the right on both sides.
        probe: None, or what collects the weight gradient before a merge.
    """

    probe: GradientProbe | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        config: LoQTConfig,
        rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        rank = config.rank if rank is None else rank
        if rank > min(in_features, out_features):
            raise UserError(
                f"loqt.rank is {rank}, but the layer is {out_features} x {in_features}; "
                f"write {min(in_features, out_features)} or less, or name the layer in loqt.exclude_modules"
            )
        self.in_features, self.out_features = in_features, out_features
        side = resolve_side(config.side, out_features, in_features)
        proj_rows, factor_rows = (in_features, out_features) if side == "input" else (out_features, in_features)
        block = config.quantization.block_size
        stored = (in_features, out_features) if transposed else (out_features, in_features)
        self.spec = LowRankSpec(
            base=MatrixLayout(*stored, config.quantization.weight, block),
            projection=MatrixLayout(proj_rows, rank, config.quantization.projection, block),
            side=OTHER_SIDE[side] if transposed else side,
            scale=config.scale,
            compute=config.compute,
            transposed=transposed,
        )
        self.base = FrozenMatrix(self.spec.base, device)
        self.projection = FrozenMatrix(self.spec.projection, device)
        self.factor = nn.Parameter(torch.zeros(factor_rows, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.probe = None

    @classmethod
    def from_linear(cls, linear: nn.Module, config: LoQTConfig, *, rank: int | None = None) -> LoQTLinear:
        """Quantizes an existing `nn.Linear` or transformers' `Conv1D`.

        A layer on the meta device gives one on the meta device, nothing allocated.
        """
        weight, bias, transposed = linear.weight, linear.bias, is_conv1d(linear)
        assert isinstance(weight, Tensor)
        in_features, out_features = weight.shape if transposed else reversed(weight.shape)
        layer = cls(
            in_features,
            out_features,
            bias=bias is not None,
            config=config,
            rank=rank,
            device=weight.device,
            dtype=weight.dtype,
            transposed=transposed,
        )
        if layer.bias is not None and isinstance(bias, nn.Parameter):
            layer.bias.requires_grad_(bias.requires_grad)
        if weight.device.type != "meta":
            with torch.no_grad():
                layer.base.store(weight)
                if layer.bias is not None and isinstance(bias, Tensor):
                    layer.bias.copy_(bias)
        return layer.train(linear.training)

    @property
    def rank(self) -> int:
        """r."""
        return self.spec.projection.cols

    @property
    def weight(self) -> Tensor:
        """W_eff, for code that reads it: dtype, device and shape are free, values are computed when they are used."""
        return dense_weight(self) if torch.compiler.is_compiling() else LazyWeight(self)

    def merged_parameters(self) -> list[nn.Parameter]:
        """What a merge replaces: codes and scales of W_q and P, and B."""
        return [*self.base.parameters(), *self.projection.parameters(), self.factor]

    @property
    def side(self) -> Side:
        """Side of the stored weight on which P stands."""
        return self.spec.side

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer.

        Args:
            x: (..., I).

        Returns:
            (..., O) in x's dtype, or in autocast's.
        """
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))
        probe, omega = (None, None) if self.probe is None else (self.probe.leaf, self.probe.omega)
        y = LowRankLinear.apply(
            x.reshape(-1, self.in_features),
            self.base.codes,
            self.base.scales,
            self.projection.codes,
            self.projection.scales,
            self.factor,
            probe,
            omega,
            self.spec,
        )
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        # as nn.Linear ends: y is nobody's view, so that it may be changed in place, also behind FSDP2's hooks
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], self.out_features))

    @torch.no_grad()
    def effective_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W_eff, dense, as the weight is stored: (O, I), or (I, O) if transposed. Only where it is not sharded."""
        projection = self.projection.dense(dtype)
        return effective_weight(self.base.dense(dtype), projection, self.factor.to(dtype), self.spec)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, rank {self.rank}, side {self.side}, scale {self.spec.scale}"
