"""Counting bytes at the collectives themselves.

Every collective of torch.distributed, whoever calls it (FSDP2, DDP's reducer, our merges), is a dispatcher operator
of the `c10d` or `_c10d_functional` namespace. `WireCounter` is a dispatch mode that sees them all and adds up their
payloads. It slows Python down, so it wraps single steps: in tests, in benchmarks, and once in a run (`FirstCounted`).

A payload is the full tensor of the operation: the gathered output, the scattered input, the reduced or broadcast
tensor. `sent_bytes` turns payloads into what one rank sends in a ring of the n ranks that take part: (n-1)/n of the
payload, twice that for an all-reduce. Whether a ring leaves a node is seen from the ranks that take part (HSDP gathers
weights inside of a node, and sums gradients across).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

# operator name begins with -> kind; the payload is the larger of what it takes and what it gives
_KINDS = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "scatter": "scatter",
    "gather": "gather",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
}


@dataclass(frozen=True)
class Message:
    """One collective call: its kind, its payload in bytes, the payload's dtype, and the ranks that take part."""

    kind: str
    payload_bytes: int
    dtype: torch.dtype
    ranks: tuple[int, ...]

    @property
    def sent_bytes(self) -> float:
        """What one rank sends in a ring."""
        share = (len(self.ranks) - 1) / len(self.ranks)
        return self.payload_bytes * share * (2 if self.kind == "all_reduce" else 1)


class WireCounter(TorchDispatchMode):
    """Records every collective inside its `with` block. See the module's docstring."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            # let DTensor go first: it turns into collectives, which then pass here (a gradient norm's all-reduce)
            return NotImplemented
        namespace, _, name = str(func.name()).partition("::")
        if namespace in ("c10d", "_c10d_functional"):
            self._record(namespace, name, args)
        return func(*args, **(kwargs or {}))

    def _record(self, namespace: str, name: str, args: Any) -> None:
        plain = name.strip("_").split(".")[0].removesuffix("_")
        kind = next(
            (_KINDS[prefix] for prefix in sorted(_KINDS, key=len, reverse=True) if plain.startswith(prefix)), None
        )
        sides = [tensors for tensors in (list(_tensors(arg)) for arg in args) if tensors]
        if kind is None or not sides:
            return
        payload, ranks = max(sum(tensor.nbytes for tensor in side) for side in sides), _ranks(args)
        if kind == "all_gather" and namespace == "_c10d_functional":
            payload *= len(ranks)  # functional gathers take only the input shard
        self.messages.append(Message(kind, payload, sides[0][0].dtype, ranks))

    def payload_bytes(self, kind: str | None = None) -> int:
        """Sum of payloads, of one kind or of all."""
        return sum(m.payload_bytes for m in self.messages if kind in (None, m.kind))

    def sent_bytes(self, *, node_size: int | None = None) -> int:
        """Bytes that one rank sends if each collective runs as a ring.

        Args:
            node_size: Count only rings of ranks of more than one node, of so many ranks each.
        """
        leave = (m for m in self.messages if node_size is None or len({rank // node_size for rank in m.ranks}) > 1)
        return round(sum(m.sent_bytes for m in leave))


class FirstCounted:
    """Counts the bytes of the first step and of the first merge of a run (`train.wire_counter: once`).

    Args:
        world_size: N.
        node_size: Ranks of a node; with several nodes, what leaves one is counted too (but for a merge's sketches).
        on: Whether to count at all.
    """

    def __init__(self, world_size: int, *, node_size: int, on: bool) -> None:
        self._world_size, self._node_size, self._on = world_size, node_size, on
        self._counted: set[str] = set()

    @contextmanager
    def first(self, name: str, *, skip: bool = False) -> Iterator[dict[str, float]]:
        """Context whose collectives are counted the first time, unless it is to `skip` it.

        Yields:
            NAME's bytes, once the context is left; it stays empty where nothing is counted.
        """
        metrics: dict[str, float] = {}
        if skip or not self._on or name in self._counted:
            yield metrics
            return
        self._counted.add(name)
        with WireCounter() as counter:
            yield metrics
        metrics[f"{name}_payload_bytes"], metrics[f"{name}_sent_bytes"] = counter.payload_bytes(), counter.sent_bytes()
        if self._node_size < self._world_size:
            metrics[f"{name}_between_nodes_bytes"] = counter.sent_bytes(node_size=self._node_size)

    def add_reduced(self, metrics: dict[str, float], name: str, payload: int) -> None:
        """Adds what was reduced to one rank outside the context, in a ring too, if NAME's bytes were counted."""
        if metrics:
            metrics[f"{name}_payload_bytes"] += payload
            metrics[f"{name}_sent_bytes"] += payload * (self._world_size - 1) // self._world_size


def _ranks(args: Any) -> tuple[int, ...]:
    """The ranks of a collective's group: a boxed group, or its name as the last argument."""
    boxed = next((arg for arg in args if isinstance(arg, torch.ScriptObject)), None)
    name = next((arg for arg in reversed(args) if isinstance(arg, str)), "")
    named: Any = distributed_c10d
    group = named._resolve_process_group(name) if boxed is None else dist.ProcessGroup.unbox(boxed)
    return tuple(dist.get_process_group_ranks(group))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
