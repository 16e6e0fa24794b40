"""Ranks in threads, for functions that sum over the shards of a matrix, and what their parts must be."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from loqt_scale.functional.compensation import Compensated


class Shards:
    """Runs one function per shard in lock step; their `sum_over_shards` really adds them up."""

    def __init__(self, count: int) -> None:
        self.barrier, self.slots = threading.Barrier(count, timeout=60), [torch.zeros(())] * count

    def sum_for(self, index: int) -> Callable[[Tensor], Tensor]:
        def summed(tensor: Tensor) -> Tensor:
            self.slots[index] = tensor
            self.barrier.wait()
            total = torch.stack(list(self.slots)).sum(0)
            self.barrier.wait()
            return total

        return summed

    def run(self, work: Callable[[int], object]) -> None:
        """Calls `work` with each shard's number, all at the same time; raises what one of them raises."""
        with ThreadPoolExecutor(len(self.slots)) as pool:
            list(pool.map(work, range(len(self.slots))))


def assert_uncut(parts: Sequence[Compensated], whole: Compensated, side: str) -> None:
    """What shards have found is what one has found: codes but for few, factor and error but for rounding."""
    codes = torch.cat([part.codes for part in parts])
    assert (codes != whole.codes).float().mean() < 0.01
    factor = torch.cat([part.factor for part in parts]) if side == "input" else parts[0].factor
    torch.testing.assert_close(factor, whole.factor, rtol=1e-2, atol=1e-2 * float(whole.factor.abs().max()))
    for part in parts:
        torch.testing.assert_close(part.error, whole.error, rtol=1e-3, atol=1e-4)
