"""What a strategy that lets FSDP2 hold a model's parameters knows of them, on one rank or on many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import cast

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
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


def share_vocabulary(model: nn.Module, share: Callable[..., object]) -> None:
    """Makes units of a model's embedding and head, before its root: FSDP2 gathers each for as long as it is needed.

    An embedding for its forward pass only, since its gradient does not depend on its values; a head until its backward
    pass, which follows at once.

    Args:
        model: The model.
        share: `fully_shard` with the strategy's settings.
    """
    embedding, head = vocabulary_layers(model)
    if embedding is not None:
        share(embedding, reshard_after_forward=True)
        cast(FSDPModule, embedding).set_unshard_in_backward(False)
    if head is not None:
        share(head, reshard_after_forward=False)


def vocabulary_layers(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The embedding and the head of a language model: (V, H) each, the largest matrices that are not in a block. Local.

    None for one that FSDP2 cannot gather by itself: it shares its weight, or its class may use it in ways of its own.
    """
    holders = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))

    def apart(name: str, kind: type[nn.Module]) -> nn.Module | None:
        layer = getattr(model, name, lambda: None)()
        plain = isinstance(layer, kind) and all(holders[parameter] == 1 for parameter in layer.parameters())
        return layer if plain else None

    return apart("get_input_embeddings", nn.Embedding), apart("get_output_embeddings", nn.Linear)
