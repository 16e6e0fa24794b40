"""DDP: everything replicated, gradients all-reduced, and merges still shared out by rows.

Replicas must not drift: each rank merges only its share of a layer's rows and the packed bytes are gathered, which is
both N times less work and the reason why all replicas hold the same bits whatever their kernels do. And a step is
judged once: the norm by which all clip, and which tells whether the step is applied, is rank 0's, and is not a number
if any rank's is not (a flipped bit after the all-reduce would otherwise be skipped by one replica alone).
"""

# no `from __future__ import annotations`: torch reads the annotations of a communication hook

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from loqt_scale.strategies.base import Strategy
from loqt_scale.strategies.editing import ReplicaEditing
from loqt_scale.strategies.float32_sums import Float32Sums
from loqt_scale.strategies.placement import Replicated
from loqt_scale.strategies.process_group import GroupComm
from loqt_scale.strategies.registry import StrategyKind, StrategyRequest
from loqt_scale.strategies.step import OptimizerStep


class DDPStep(OptimizerStep):
    """See the module's docstring."""

    _norm: Tensor | None = None  # of this step's gradients, as agreed

    def wrap(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        """Wraps in DistributedDataParallel, with a hook that sums instead of averaging. Every rank."""
        device = self.comm.device
        wrapped = DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
        wrapped.register_comm_hook(self, _sum_hook)
        # torch's C++ reducer drops its process group while holding the GIL, which gloo's thread may need to end: a
        # deadlock if that was the last reference. This one, set after `reducer`, goes after it and without the GIL.
        wrapped.__dict__["process_group_outlives_reducer"] = wrapped.process_group
        return wrapped

    def sum_in_float32(self, parameters: Sequence[nn.Parameter]) -> None:
        """The last pass's gradients stay in DDP's buckets, which join the sums on their way over the wire. Local."""
        self.sums = Float32Sums(parameters, self.placement.local, last_apart=True)

    def micro_step(self, model: nn.Module, *, last: bool) -> AbstractContextManager[object]:
        """Skips the all-reduce in all but the last micro-step."""
        assert isinstance(model, DistributedDataParallel)
        return super().micro_step(model, last=last) if last else model.no_sync()

    def forward_alone(self, model: nn.Module) -> nn.Module | None:
        """See `Step.forward_alone`: without the wrapper, which sends buffers around before each forward pass."""
        inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        return inner

    def sum_step(self, numbers: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """See `Step.sum_step`: the gradients' norm travels with them. Every rank. One all-reduce."""
        own = self.stored_norm(parameters)
        said = own if self.comm.rank == 0 else own * 0.0  # of what is not finite: NaN
        summed = self.sum(torch.cat([numbers, said.reshape(1).to(numbers)]))
        self._norm = summed[-1].to(own)
        return summed[:-1]

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """What `sum_step` has agreed on; without it this rank's own."""
        agreed, self._norm = self._norm, None
        return self.stored_norm(parameters) if agreed is None else agreed


def _sum_hook(step: DDPStep, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Sums a bucket of gradients over ranks: as it is, or with what earlier passes left, in float32."""
    buffer: Tensor = bucket.buffer()
    total = buffer if step.sums is None else step.sums.join(bucket.parameters(), buffer)
    work = dist.all_reduce(total, async_op=True)
    future: torch.futures.Future[list[Tensor]] = work.get_future()
    return future.then(lambda done: done.value()[0] if total is buffer else buffer.copy_(done.value()[0]))


def _create(request: StrategyRequest) -> Strategy:
    comm = GroupComm(request.device, request.parallel.timeout_seconds, store=request.store)
    placement = Replicated(request.device)
    step = DDPStep(comm, placement, request.compute_dtype)
    return Strategy(
        description="ddp", comm=comm, placement=placement, step=step, editing=ReplicaEditing(comm, placement)
    )


DDP = StrategyKind(name="ddp", create=_create)
