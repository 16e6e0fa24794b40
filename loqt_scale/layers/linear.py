"""LoQTLinear: a linear layer with a quantized, frozen base and one trainable low-rank factor.

The layer knows no ranks, steps or schedules. `forward` reads its packed tensors and, on the rare steps on which a merge
follows, a `GradientProbe` that the merge coordinator has attached; everything else happens in
`functional.low_rank_linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loqt_scale.config import LoQTConfig
from loqt_scale.functional.low_rank_linear import LowRankLinear, effective_weight
from loqt_scale.layers.layer import LoQTLayer, layer_spec
from loqt_scale.layers.weight import LazyWeight, dense_weight


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D` (GPT-2): a linear layer whose weight is stored (I, O)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


class LoQTLinear(LoQTLayer):
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
        bias: Or None; the others are those of `LoQTLayer`.
    """

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
        spec = layer_spec(in_features, out_features, config, rank, transposed=transposed)
        super().__init__(spec, device, dtype)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

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
    def weight(self) -> Tensor:
        """W_eff, for code that reads it: dtype, device and shape are free, values are computed when they are used."""
        return dense_weight(self) if torch.compiler.is_compiling() else LazyWeight(self)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer.

        Args:
            x: (..., I).

        Returns:
            (..., O) in x's dtype, or in autocast's.
        """
        x = self.as_computed(x)
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
        if not torch.compiler.is_compiling():
            self.count_pass()
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
