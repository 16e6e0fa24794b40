"""DDP: everything replicated, gradients all-reduced, and merges still shared out by rows.

Replicas must not drift: each rank merges only its share of a layer's rows and the packed bytes are gathered, which is
both N times less work and the reason why all replicas hold the same bits whatever their kernels do. And a step is
judged once: the norm by which all clip, and which tells whether the step is applied, is rank 0's, and is not a number
if any rank's is not (a flipped bit after the all-reduce would otherwise be skipped by one replica alone).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from loqt_scale.strategies.float32_sums import Float32Sums
from loqt_scale.strategies.process_group import DistributedStrategy


class DDPStrategy(DistributedStrategy):
    """See the module's docstring."""

    name = "ddp"
    _norm: Tensor | None = None  # of this step's gradients, as agreed

    def wrap(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Wraps in DistributedDataParallel, with a hook that sums instead of averaging. Every rank."""
        wrapped = DistributedDataParallel(
            model,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        wrapped.register_comm_hook(self, _sum_hook)
        # torch's C++ reducer drops its process group while holding the GIL, which gloo's thread may need to end: a
        # deadlock if that was the last reference. This one, set after `reducer`, goes after it and without the GIL.
        wrapped.__dict__["process_group_outlives_reducer"] = wrapped.process_group
        return wrapped

    def sum_in_float32(self, parameters: Sequence[nn.Parameter]) -> None:
        """The last pass's gradients stay in DDP's buckets, which join the sums on their way over the wire. Local."""
        self._sums = Float32Sums(parameters, self.local, last_apart=True)

    def micro_step(self, model: nn.Module, *, last: bool) -> AbstractContextManager[object]:
        """Skips the all-reduce in all but the last micro-step."""
        assert isinstance(model, DistributedDataParallel)
        return super().micro_step(model, last=last) if last else model.no_sync()

    def forward_alone(self, model: nn.Module) -> nn.Module | None:
        """See `Strategy.forward_alone`: without the wrapper, which sends buffers around before each forward pass."""
        inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        return inner

    def sum_step(self, numbers: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """See `Strategy.sum_step`: the gradients' norm travels with them. Every rank. One all-reduce."""
        own = self.stored_norm(parameters)
        said = own if self.rank == 0 else own * 0.0  # of what is not finite: NaN
        summed = self.sum(torch.cat([numbers, said.reshape(1).to(numbers)]))
        self._norm = summed[-1].to(own)
        return summed[:-1]

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """What `sum_step` has agreed on; without it this rank's own."""
        agreed, self._norm = self._norm, None
        return self.stored_norm(parameters) if agreed is None else agreed


def _sum_hook(strategy: DDPStrategy, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Sums a bucket of gradients over ranks: as it is, or with what earlier passes left, in float32."""
    buffer: Tensor = bucket.buffer()
    total = buffer if strategy._sums is None else strategy._sums.join(bucket.parameters(), buffer)
    work = dist.all_reduce(total, async_op=True)
    future: torch.futures.Future[list[Tensor]] = work.get_future()
    return future.then(lambda done: done.value()[0] if total is buffer else buffer.copy_(done.value()[0]))
