"""What all LoQT layers have in common: packed W_q and P, a trainable B, and a probe before a merge.

A layer knows no ranks, steps or schedules.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loqt_scale.config import LoQTConfig, Side
from loqt_scale.errors import UserError
from loqt_scale.functional.low_rank_linear import OTHER_SIDE, LowRankSpec, resolve_side
from loqt_scale.functional.quantization import MatrixLayout
from loqt_scale.layers import copies
from loqt_scale.layers.frozen import FrozenMatrix
from loqt_scale.process.caller import warn_caller

BLANK_PASSES = 32
NO_MERGES = (
    f"LoQT: P is still zero after {BLANK_PASSES} training passes, so B does not train: nothing merges. Attach a "
    "coordinator, merges = attach(model, optimizer, config), and call merges.prepare() before the forward passes of "
    "every step and merges.finish() after its optimizer.step()"
)


@dataclass
class GradientProbe:
    """Collects a weight gradient, dense or sketched, in `leaf.grad` while it is attached to a layer.

    Args:
        leaf: Leaf tensor whose *gradient* is wanted; its values are never read. (O, I) dense, or (F, l) sketched; of
            experts one of each, (E, O, I) or (E, F, l).
        omega: What the sketch's test matrix is made of (see `projection.test_matrix`), one row for each of O features
            on side input, of I on side output; None collects the dense gradient.
        outlives: Whether it holds gradients of passes whose others somebody has thrown away (`zero_grad`).
    """

    leaf: Tensor
    omega: Tensor | None
    outlives: bool = False

    @classmethod
    def collecting(cls, shape: tuple[int, ...], omega: Tensor | None, device: torch.device) -> GradientProbe:
        """A probe whose leaf takes no memory of its own (stride 0)."""
        leaf = torch.zeros((), dtype=torch.float32, device=device).expand(shape).detach().requires_grad_()
        return cls(leaf=leaf, omega=omega)


def layer_spec(
    in_features: int,
    out_features: int,
    config: LoQTConfig,
    rank: int | None,
    *,
    transposed: bool,
    experts: int | None = None,
) -> LowRankSpec:
    """The static facts of a layer, or of `experts` layers one below the other.

    Raises:
        ValueError: The rank exceeds the smaller side.
    """
    rank = config.rank if rank is None else rank
    if rank > min(in_features, out_features):
        raise UserError(
            f"loqt.rank is {rank}, but the layer is {out_features} x {in_features}; "
            f"write {min(in_features, out_features)} or less, or name the layer in loqt.exclude_modules"
        )
    side, count = resolve_side(config.side, out_features, in_features), experts or 1
    proj_rows = in_features if side == "input" else out_features
    rows, cols = (in_features, out_features) if transposed else (out_features, in_features)
    block = config.quantization.block_size
    return LowRankSpec(
        base=MatrixLayout(count * rows, cols, config.quantization.weight, block),
        projection=MatrixLayout(count * proj_rows, rank, config.quantization.projection, block),
        side=OTHER_SIDE[side] if transposed else side,
        scale=config.scale,
        compute=config.compute,
        transposed=transposed,
        experts=experts,
    )


class LoQTLayer(nn.Module):
    """See the module's docstring.

    Args:
        spec: The layer's facts.
        device: Where parameters live; `meta` allocates nothing.
        dtype: Dtype of `factor`.

    Attributes:
        base: W_q, a FrozenMatrix (O x I).
        projection: P, a FrozenMatrix (F x r), F = I on side input, O on side output. Zero until the first merge, or
            until a start that makes up for quantization (`loqt.init`).
        factor: B, trainable, (O, r) on side input, (I, r) on side output: always rows x rank, so that it shards like
            its layer and the optimizer's state rotates from the right on both sides.
        probe: None, or what collects the weight gradient before a merge.
        loads: How often a state dict was loaded.
    """

    probe: GradientProbe | None
    loads = 0

    def __init__(self, spec: LowRankSpec, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.spec = spec
        self.base = FrozenMatrix(spec.base, device)
        self.projection = FrozenMatrix(spec.projection, device)
        each = spec.each.base
        rows = spec.expert_count * (each.rows if spec.side == "input" else each.cols)
        self.factor = nn.Parameter(torch.zeros(rows, spec.projection.cols, device=device, dtype=dtype))
        self.probe = None
        self._blank_passes = 0  # training passes that nobody collected the gradient of; negative: P has been seen

    @property
    def rank(self) -> int:
        """r."""
        return self.spec.projection.cols

    @property
    def side(self) -> Side:
        """Side of the stored weight on which P stands."""
        return self.spec.side

    def merged_parameters(self) -> list[nn.Parameter]:
        """What a merge replaces: codes and scales of W_q and P, and B."""
        return [*self.base.parameters(), *self.projection.parameters(), self.factor]

    def as_computed(self, x: Tensor) -> Tensor:
        """An input in the dtype in which the layer computes: its own, or autocast's.

        Raises:
            UserError: It holds no floating-point numbers; W would be rounded to whole ones.
        """
        if not x.is_floating_point():
            raise UserError(f"the input of a LoQT layer is {x.dtype}, not floating-point; give it x.float()")
        device_type = x.device.type
        return x.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else x

    def count_pass(self) -> None:
        """Says it once if P is still zero after many training passes, of which no coordinator collected anything."""
        if self.probe is not None:
            self.probe.outlives |= self.probe.leaf.grad is not None and self.factor.grad is None
        if self._blank_passes < 0 or self.probe is not None or not self.training or not torch.is_grad_enabled():
            return
        if not self.factor.requires_grad:
            return
        self._blank_passes += 1
        if self._blank_passes < BLANK_PASSES:
            return
        self._blank_passes = -1
        packed = self.projection.codes if self.projection.scales is None else self.projection.scales
        if may_be_read(packed) and not bool(packed.any()):
            warn_caller(NO_MERGES)

    def __getstate__(self) -> dict[str, Any]:
        """Of copies and pickles: without a probe, which belongs to a step of this model's own merges."""
        return {**self.__dict__, "probe": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> LoQTLayer:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        copies.add_copy(self, copied)
        return copied

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata["loqt"] = self._meaning()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """As `nn.Module` does; and a state dict that still says what it means must mean the same.

        Raises:
            UserError: It holds a dense weight in the place of the packed tensors, which `strict=False` would ignore.
        """
        dense = self.weight_name(prefix[:-1])
        if dense in state_dict and f"{prefix}base.codes" not in state_dict:
            raise UserError(
                f"load_state_dict: {dense} is dense, but {prefix[:-1]} is a LoQT layer, which would stay as it is; "
                "load these weights before convert_to_loqt(model, config), or into loqt_scale.to_dense(model)"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        copies.excuse(self)
        self.loads += 1
        saved = local_metadata.get("loqt", {})
        for key, value in self._meaning().items():
            if saved.get(key, value) != value:
                lists[-1].append(
                    f"{prefix[:-1]} was saved with {key} {saved[key]!r}, but has {value!r}; convert with LoQTConfig("
                    f"{key}={saved[key]!r})"
                )

    def _meaning(self) -> dict[str, Any]:
        """What the shapes of the stored tensors do not tell."""
        return {"scale": self.spec.scale, "side": self.spec.side}

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As `nn.Module` does, of the layer's own parameters.

        Raises:
            UserError: Somebody ties, prunes or replaces the weight, which is computed.
        """
        if name.startswith("weight"):
            raise UserError(
                f"the weight of a LoQT layer is computed from W_q, P and B: it cannot be tied, pruned or replaced "
                f"({name}); do so before convert_to_loqt, or with loqt_scale.to_dense(model)"
            )
        super().register_parameter(name, param)

    def reset_parameters(self) -> None:
        """Refused.

        Raises:
            UserError: Always: what is packed cannot be drawn anew.
        """
        raise UserError("a LoQT layer cannot be initialized anew; initialize the model, then convert_to_loqt")

    def weight_name(self, name: str) -> str:
        """Name of the parameter that the layer stands for, in the unconverted model, if the layer's is `name`."""
        return f"{name}.weight"

    def weight_shape(self) -> tuple[int, ...]:
        """That parameter's shape."""
        return (self.spec.base.rows, self.spec.base.cols)


def may_be_read(tensor: Tensor) -> bool:
    """Whether the host can look at a tensor's values now: not while they are recorded, transformed or imagined."""
    if tensor.device.type == "meta" or type(tensor) not in (Tensor, nn.Parameter) or tensor.numel() == 0:
        return False
    if torch._C._functorch.maybe_current_level() is not None:
        return False
    return tensor.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()
