"""What measures a rank from outside of the product: the CPU allocator's log, and who reads numbers of the device."""

from __future__ import annotations

import gc
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Allocations:
    """What the CPU allocator did inside a block.

    Args:
        kept: Bytes allocated inside and still there at its end.
        passing: Bytes at the highest moment, beyond `kept`.
        largest: The largest allocations alive at that moment.
    """

    kept: int = 0
    passing: int = 0
    largest: tuple[int, ...] = ()


@contextmanager
def allocations() -> Iterator[Allocations]:
    """Logs every allocation of torch's CPU allocator, those inside of operators and of LAPACK's workspaces too.

    Memory from before the block counts as neither allocated nor freed, which can only make `passing` larger.
    """
    result = Allocations()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield result
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    total, highest, alive = 0, 0, Counter[int]()
    for event in events:
        size = event.nbytes()
        total += size
        alive[abs(size)] += 1 if size > 0 else -1
        if total > highest:
            highest, result.largest = total, tuple(sorted(alive.elements(), reverse=True)[:12])
    result.kept, result.passing = total, highest - max(total, 0)


class HostReads(TorchDispatchMode):
    """Notes who calls `.item()`, `float(tensor)`, `bool(tensor)` and the like: on a GPU each waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.places.append("".join(traceback.format_stack(limit=8)))
        return operator(*args, **(kwargs or {}))
