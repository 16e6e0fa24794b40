"""Where ZeRO keeps a model: whole under stages 1 and 2; under stage 3 cut into N parts, value by value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loqt_scale.layers import LoQTLayer
from loqt_scale.optim import RowShards
from loqt_scale.strategies.comm import Comm
from loqt_scale.strategies.placement import Placement
from loqt_scale.strategies.zero.engine import ZeroEngine
from loqt_scale.strategies.zero.flat import init_of_zeros


def master_shards(comm: Comm) -> RowShards:
    """The ranks that each hold a part of what trains, in float32. These masters may lie in host memory."""
    return RowShards(lambda tensor: comm.sum(tensor.to(comm.device)).to(tensor.device), comm.rank, comm.world_size)


class ZeroPlacement(Placement):
    """See the module's docstring. Every rank's part of the moments is consecutive values, not rows.

    Args:
        comm: The ranks.
        engine: DeepSpeed's.
        compute_dtype: Of the parameters; the masters are float32.
    """

    def __init__(self, comm: Comm, engine: ZeroEngine, compute_dtype: torch.dtype) -> None:
        super().__init__(comm.device, master_shards(comm))
        self._engine, self._compute_dtype = engine, compute_dtype

    def shard(self, model: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        """Sizes DeepSpeed's buckets; under stage 3 allocates and shards the model, module by module."""
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self._engine.settle(trained)
        if self._engine.stage == 3:
            # the layer reads the parameters of its two FrozenMatrix children: they are gathered as one unit with it
            self._engine.deepspeed.utils.set_z3_leaf_modules(model, [LoQTLayer], raise_if_not_found=False)
            self._allocate_shards(model)
        return model

    def _allocate_shards(self, model: nn.Module) -> None:
        """Gives a meta-device model storage of which each rank keeps 1/N: never more than one module's whole."""
        cut = init_of_zeros(self._engine.deepspeed)
        placed: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # the old one is kept so that its id stays its own
        for module in reversed(list(model.modules())):  # children first: it goes down from where it is called
            own = list(module.named_parameters(recurse=False))
            for name, parameter in own:
                if id(parameter) not in placed:
                    dtype = self._compute_dtype if parameter.dtype.is_floating_point else parameter.dtype
                    whole = torch.zeros(parameter.shape, dtype=dtype, device=self.device)
                    placed[id(parameter)] = parameter, nn.Parameter(whole, requires_grad=parameter.requires_grad)
                module.register_parameter(name, placed[id(parameter)][1])
            if own:
                cut(module=module, config_dict_or_path=self._engine.settings)

    def stored_rows(self, parameter: Tensor) -> tuple[int, int]:
        """All: what a rank stores of a parameter are no rows, and what the optimizer has of it `adopt` says."""
        return 0, parameter.shape[0]

    def local(self, tensor: Tensor) -> Tensor:
        """The tensor, which holds nothing under stage 3 unless it is gathered."""
        return tensor
