"""One process: it stores everything, reads every sequence and has nobody to talk to."""

from __future__ import annotations

import torch

from loqt_scale.strategies.base import Strategy
from loqt_scale.strategies.comm import SingleComm
from loqt_scale.strategies.editing import ReplicaEditing
from loqt_scale.strategies.offload import offloaded
from loqt_scale.strategies.placement import Replicated
from loqt_scale.strategies.registry import StrategyKind, StrategyRequest
from loqt_scale.strategies.step import OptimizerStep


def single_process(device: torch.device, compute_dtype: torch.dtype = torch.float32) -> Strategy:
    """The strategy of one process on one device.

    Args:
        device: Where it computes.
        compute_dtype: float32, or bfloat16 for mixed precision over float32 parameters.
    """
    comm, placement = SingleComm(device), Replicated(device)
    step = OptimizerStep(comm, placement, compute_dtype)
    return Strategy(
        description="single", comm=comm, placement=placement, step=step, editing=ReplicaEditing(comm, placement)
    )


def _create(request: StrategyRequest) -> Strategy:
    what = request.parallel.offload
    if what != "none":
        return offloaded(request.device, request.compute_dtype, what)
    return single_process(request.device, request.compute_dtype)


SINGLE = StrategyKind(name="single", create=_create, launched=False)
