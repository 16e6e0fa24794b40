"""Joining a process group from a launcher's environment, and the talking that every multi-process strategy shares."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import Store
from torch.distributed.tensor import DTensor, Shard

from loqt_scale.process.environment import launched_rank, launched_world_size
from loqt_scale.strategies.base import Channel, Reducer, Strategy
from loqt_scale.strategies.rendezvous import open_store


def join_process_group(device: torch.device, timeout_seconds: int, store: Store | None = None) -> bool:
    """Joins the launcher's process group: nccl for CUDA, gloo for the CPU. True if this call joined it. Every rank.

    Args:
        device: Where this rank computes.
        timeout_seconds: Limit of a collective.
        store: What only this job's ranks see; default: the launcher's.
    """
    if dist.is_initialized():
        return False
    backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout_seconds)
    store = open_store(timeout_seconds) if store is None else store
    dist.init_process_group(
        backend, timeout=timeout, store=store, rank=launched_rank(), world_size=launched_world_size()
    )
    return True


# torch 2.13 renamed it and warns of the old name; 2.11 has only that one
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class GroupChannel(Channel):
    """A gloo group on the host, whatever the tensors travel by."""

    def gather_objects(self, mine: Any) -> list[Any]:
        """See `Channel.gather_objects`. Every rank."""
        return gather_objects(mine, self.group)


class GroupReducer(Reducer):
    """A group of its own: what is sent in it keeps its order whatever other collectives do in between.

    Args:
        rank: This rank.
        group: The process group.
    """

    def __init__(self, rank: int, group: Any) -> None:
        super().__init__(rank)
        self._group = group

    def begin(self, tensor: Tensor, owner: int) -> Callable[[], object]:
        """See `Reducer.begin`. Every rank. One reduce."""
        work = dist.reduce(tensor, dst=owner, group=self._group, async_op=True)
        assert work is not None
        self.payload_bytes += tensor.nbytes
        wait: Callable[[], object] = work.wait
        return wait


def gather_objects(mine: Any, group: Any = None) -> list[Any]:
    """What each rank of a group (default: of all) holds, by rank, on every rank. Every rank of it."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return found


class DistributedStrategy(Strategy):
    """Several ranks in one process group: the talk, and work shares that every rank stores whole unless overridden.

    Args:
        device: Where this rank computes.
        compute_dtype: float32 or bfloat16.
        timeout_seconds: Limit of a collective.
        store: What only this job's ranks see; default: the launcher's.
    """

    name = "distributed"

    def __init__(
        self,
        device: torch.device,
        compute_dtype: torch.dtype,
        timeout_seconds: int = 600,
        *,
        store: Store | None = None,
    ) -> None:
        super().__init__(device, compute_dtype)
        self._joined = join_process_group(device, timeout_seconds, store)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._timeout = timedelta(seconds=timeout_seconds)
        self._host_mesh: DeviceMesh | None = None
        self._channel: Channel | None = None
        self._reducer: Reducer | None = None

    def write(self, parameter: Tensor, piece: Tensor) -> None:
        """Gathers every rank's share and stores it on every rank. Every rank. One all-gather."""
        ranges = [self.rows(parameter.shape[0], rank) for rank in range(self.world_size)]
        self.store(parameter, self.gather_pieces(piece, ranges))

    def gather_pieces(self, piece: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """See `Strategy.gather_pieces`. Every rank. One all-gather of pieces padded to the largest."""
        most = max(stop - start for start, stop in ranges)
        padded = piece.new_zeros((most, *piece.shape[1:]))
        padded[: piece.shape[0]] = piece
        gathered = piece.new_empty((self.world_size * most, *piece.shape[1:]))
        _all_gather(gathered, padded)
        return torch.cat([gathered[i * most : i * most + stop - start] for i, (start, stop) in enumerate(ranges)])

    def as_shard(self, piece: Tensor, shape: Sequence[int]) -> Tensor:
        """See `Strategy.as_shard`: a DTensor on the host, whose dim 0 is cut as `rows` cuts it."""
        if self._host_mesh is None:
            self._host_mesh = init_device_mesh("cpu", (self.world_size,))
        whole = torch.empty(tuple(shape), device="meta")
        return DTensor.from_local(
            piece, self._host_mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def gather_objects(self, mine: Any) -> list[Any]:
        """See `Strategy.gather_objects`. Every rank."""
        return gather_objects(mine)

    def side_channel(self) -> Channel:
        """See `Strategy.side_channel`. Every rank, the first time."""
        if self._channel is None:
            self._channel = GroupChannel(self.rank, dist.new_group(backend="gloo", timeout=self._timeout))
        return self._channel

    def sum(self, tensor: Tensor) -> Tensor:
        """See `Strategy.sum`. Every rank. One all-reduce."""
        tensor = tensor.contiguous()
        dist.all_reduce(tensor)
        return tensor

    def open_reducer(self) -> Reducer:
        """See `Strategy.open_reducer`. Every rank, the first time."""
        if self._reducer is None:
            self._reducer = GroupReducer(self.rank, dist.new_group(timeout=self._timeout))
        return self._reducer

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """See `Strategy.broadcast`. Every rank. One broadcast."""
        dist.broadcast(tensor, src=owner)

    def barrier(self) -> None:
        """See `Strategy.barrier`. Every rank."""
        dist.barrier()

    def close(self) -> None:
        """Destroys the process group if this strategy created it. Every rank."""
        if self._joined and dist.is_initialized():
            # torch.distributed.checkpoint leaves a cycle that holds the group; freed at the interpreter's end, gloo's
            # thread is still running then and the process aborts
            gc.collect()
            dist.destroy_process_group()
