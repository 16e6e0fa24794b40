"""How the rows of what trains are spread over ranks, as far as an optimizer must know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RowShards:
    """The ranks that each store a part of every parameter.

    Args:
        sum: Sum of a tensor over them, the same on all. Every one of them.
        shard_rank: This one's place among them.
        shard_size: How many they are; 1: every rank stores everything.
    """

    sum: Callable[[Tensor], Tensor] = lambda tensor: tensor
    shard_rank: int = 0
    shard_size: int = 1
