"""What a strategy that lets FSDP2 hold a model's parameters knows of them, on one rank or on many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import DTensor

from loqt_scale.strategies.base import Strategy


class FSDPModelStrategy(Strategy):
    """Base of the strategies that call `fully_shard`."""

    def local(self, tensor: Tensor) -> Tensor:
        """What this rank stores behind a DTensor."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def after_forward_only(self, model: nn.Module) -> None:
        """What stays gathered for the backward pass is freed: modules would not hold the parameters that train."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class _BytesNeedNoGradient:
    """`torch.nn` whose parameters of bytes require no gradient by default (they cannot)."""

    @staticmethod
    def Parameter(data: Tensor, requires_grad: bool | None = None) -> nn.Parameter:
        wanted = data.is_floating_point() or data.is_complex() if requires_grad is None else requires_grad
        return nn.Parameter(data, requires_grad=wanted)

    def __getattr__(self, name: str) -> Any:
        return getattr(nn, name)


@contextmanager
def packed_bytes_may_be_sharded() -> Iterator[None]:
    """Around `fully_shard`: before torch 2.13 it asks for a gradient of every shard first, and takes that back.

    "only Tensors of floating point dtype can require gradients" is what packed bytes would end with.
    """
    if torch.__version__ >= torch.torch_version.TorchVersion("2.13"):
        yield
        return
    names = vars(_fsdp_param)
    names["nn"] = _BytesNeedNoGradient()
    try:
        yield
    finally:
        names["nn"] = nn
