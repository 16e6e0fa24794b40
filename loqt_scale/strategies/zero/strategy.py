"""ZeRO: the model inside a DeepSpeed engine, stages 1 to 3.

What DeepSpeed shards, and therefore what a rank holds:

    stage   moments, fp32 masters of B ...   gradients   B, embeddings ...   codes and scales of W and P
    1       1/N                                  whole       whole               whole
    2       1/N                                  1/N         whole               whole
    3       1/N                                  1/N         1/N                 1/N, as bytes
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from loqt_scale.process.environment import launched_world_size
from loqt_scale.strategies.base import Strategy
from loqt_scale.strategies.process_group import GroupComm
from loqt_scale.strategies.registry import StrategyKind, StrategyRequest
from loqt_scale.strategies.zero.editing import ZeroEditing
from loqt_scale.strategies.zero.engine import ZeroEngine, import_deepspeed
from loqt_scale.strategies.zero.placement import ZeroPlacement
from loqt_scale.strategies.zero.step import ZeroStep


class DeepSpeedComm(GroupComm):
    """A process group that DeepSpeed knows too.

    Args:
        device: Where this rank computes.
        timeout_seconds: Limit of a collective.
        deepspeed: DeepSpeed.
        store: What only this job's ranks see; default: the launcher's.
    """

    def __init__(
        self, device: torch.device, timeout_seconds: int, deepspeed: Any, *, store: Store | None = None
    ) -> None:
        super().__init__(device, timeout_seconds, store=store)
        self._deepspeed = deepspeed
        # DeepSpeed's own view of the group that has just been joined
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)

    def close(self) -> None:
        """Leaves the process group if this object joined it. Every rank."""
        if self._joined and self._deepspeed.comm.is_initialized():
            self._deepspeed.comm.destroy_process_group()
        super().close()


@dataclass(frozen=True, kw_only=True)
class ZeroStrategy(Strategy):
    """See the module's docstring.

    Args:
        engine: DeepSpeed's.
    """

    engine: ZeroEngine

    def run_files(self) -> Mapping[str, str]:
        """DeepSpeed's configuration, as it was given to it."""
        return {"deepspeed.json": json.dumps(self.engine.settings, indent=2) + "\n"}

    def close(self) -> None:
        """Stops the engine and leaves the process group if this strategy joined it. Every rank."""
        self.engine.stop()
        super().close()


def _create(request: StrategyRequest) -> ZeroStrategy:
    parallel, device = request.parallel, request.device
    deepspeed = import_deepspeed(device, parallel.zero_log_level)
    engine = ZeroEngine(deepspeed, request.config, world_size=launched_world_size())
    comm = DeepSpeedComm(device, parallel.timeout_seconds, deepspeed, store=request.store)
    return ZeroStrategy(
        description=f"zero stage {engine.stage}",
        comm=comm,
        placement=ZeroPlacement(comm, engine, request.compute_dtype),
        step=ZeroStep(comm, engine),
        editing=ZeroEditing(comm, engine),
        engine=engine,
    )


ZERO = StrategyKind(name="zero", create=_create, only_trains=True)
