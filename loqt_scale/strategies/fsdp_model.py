"""What a strategy that lets FSDP2 hold a model's parameters knows of them, on one rank or on many."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from loqt_scale.strategies.placement import Placement
from loqt_scale.strategies.step import OptimizerStep
from loqt_scale.strategies.whole import reshard


class FSDPModelPlacement(Placement):
    """Base of the placements that call `fully_shard`."""

    def local(self, tensor: Tensor) -> Tensor:
        """What this rank stores behind a DTensor."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class FSDPModelStep(OptimizerStep):
    """A step of a model on which `fully_shard` was called."""

    def forward_alone(self, model: nn.Module) -> nn.Module | None:
        """See `Step.forward_alone`: each block is gathered for its forward pass."""
        return None

    def after_forward_only(self, model: nn.Module) -> None:
        """What stays gathered for the backward pass is freed: modules would not hold the parameters that train."""
        reshard(model)
