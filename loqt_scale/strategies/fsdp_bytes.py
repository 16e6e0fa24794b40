"""Packed bytes as parameters of FSDP2 before torch 2.13, which mended both of these (private names, used nowhere else).

* A shard was made a parameter that requires a gradient, which was taken back a line later; bytes cannot be one: "only
  Tensors of floating point dtype can require gradients".
* Mixed precision cast bytes too, on their way into the gathered block: twice as many of them came out.

tests/cuda/test_strategies.py, run with that torch, would notice (`LOQT_TEST_DEVICE=cpu` will do).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.torch_version import TorchVersion

TAKES_BYTES = TorchVersion(torch.__version__) >= TorchVersion("2.13")
_FSDPParam = _fsdp_param.FSDPParam
_init_dtype_attrs = _FSDPParam.init_dtype_attrs


@contextmanager
def packed_bytes_may_be_sharded() -> Iterator[None]:
    """To be entered around `fully_shard` of modules that hold packed bytes. Local."""
    if TAKES_BYTES:
        yield
        return
    _FSDPParam.init_dtype_attrs = _dtypes_but_for_bytes  # type: ignore[assignment, method-assign]
    names = vars(_fsdp_param)
    names["nn"] = _BytesNeedNoGradient()
    try:
        yield
    finally:
        names["nn"] = nn


class _BytesNeedNoGradient:
    """`torch.nn` whose parameters of bytes require no gradient unless told otherwise."""

    @staticmethod
    def Parameter(data: Tensor, requires_grad: bool | None = None) -> nn.Parameter:
        """As `nn.Parameter`."""
        return nn.Parameter(data, requires_grad=data.is_floating_point() if requires_grad is None else requires_grad)

    def __getattr__(self, name: str) -> Any:
        return getattr(nn, name)


def _dtypes_but_for_bytes(self: Any, policy: MixedPrecisionPolicy) -> None:
    """`FSDPParam.init_dtype_attrs` as torch 2.13 has it: called at the first forward pass, long after `fully_shard`."""
    _init_dtype_attrs(self, policy)
    if not self.orig_dtype.is_floating_point:
        self.param_dtype = None
