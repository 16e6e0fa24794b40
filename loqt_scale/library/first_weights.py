"""The weights before quantization, kept until the first merge, which makes up for what quantization has rounded away.

They are the dense model's own tensors, which would be freed at the conversion: kept in host memory from the conversion
to the end of the first merge, so that nobody needs a second copy of the model, or the name of its folder.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch import Tensor, nn

from loqt_scale.layers import loqt_layers
from loqt_scale.layers.names import plain_name
from loqt_scale.merge import InitialWeights
from loqt_scale.merge.initial_weights import as_initial_weights
from loqt_scale.process.environment import only_rank_zero_loads


class FirstWeights:
    """Reads them by rows, as merges do.

    Args:
        before: The model's parameters from before the conversion, by name; of layers that stayed nothing is kept.
        model: The converted model.
    """

    def __init__(self, before: Mapping[str, Tensor], model: nn.Module) -> None:
        layers = dict(loqt_layers(model))
        names = [layer.weight_name(name) for name, layer in layers.items()]
        plain = {plain_name(name): weight for name, weight in before.items()}
        kept = {name: _of_rank_zero(plain[name].detach()) for name in names}
        self._source: InitialWeights | None = as_initial_weights(kept, layers)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `InitialWeights.rows`."""
        assert self._source is not None, "a layer's first merge came after all layers had been merged"
        return self._source.rows(name, start, stop)

    def release(self) -> None:
        """Lets go of them: every layer has been merged."""
        self._source = None


def _of_rank_zero(weight: Tensor) -> Tensor:
    """The weight in host memory. Where only rank 0 has loaded the model (FSDP's loading), its values. Every rank."""
    if not only_rank_zero_loads() or PartialState().num_processes == 1:
        return weight.cpu()
    device = PartialState().device
    whole = torch.empty_like(weight, device=device) if weight.is_meta else weight.to(device)
    shared: Tensor = broadcast(whole, from_process=0)
    return shared.cpu()
