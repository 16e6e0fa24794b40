"""Several ranks in one process group of torch.distributed, joined from a launcher's environment."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import Store

from loqt_scale.process.environment import launched_rank, launched_world_size
from loqt_scale.strategies.comm import Channel, Comm, Reducer, gather_objects
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


class GroupComm(Comm):
    """The ranks of a launcher: making one joins them. Or those of a process group that there is. Every rank of it.

    Args:
        device: Where this rank computes.
        timeout_seconds: Limit of a collective.
        store: What only this job's ranks see; default: the launcher's.
        group: Somebody's process group, of all ranks or some: used, and neither joined nor destroyed. Ranks are then
            places in it.
    """

    def __init__(
        self, device: torch.device, timeout_seconds: int = 600, *, store: Store | None = None, group: Any = None
    ) -> None:
        self._joined = group is None and join_process_group(device, timeout_seconds, store)
        self._group = group
        super().__init__(device, dist.get_rank(group), dist.get_world_size(group))
        self._timeout = timedelta(seconds=timeout_seconds)
        self._host_mesh: DeviceMesh | None = None
        self._channel: Channel | None = None
        self._reducer: Reducer | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        """See `Comm.sum`. Every rank. One all-reduce."""
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """See `Comm.broadcast`. Every rank. One broadcast."""
        dist.broadcast(tensor, group_src=owner, group=self._group)

    def gather_pieces(self, piece: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """See `Comm.gather_pieces`. Every rank. One all-gather of pieces padded to the largest."""
        most, least = (of(stop - start for start, stop in ranges) for of in (max, min))
        padded = piece.contiguous()
        if least < most:
            padded = piece.new_zeros((most, *piece.shape[1:]))
            padded[: piece.shape[0]] = piece
        gathered = piece.new_empty((self.world_size * most, *piece.shape[1:]))
        _all_gather(gathered, padded, group=self._group)
        if least == most:
            return gathered
        return torch.cat([gathered[i * most : i * most + stop - start] for i, (start, stop) in enumerate(ranges)])

    def gather_objects(self, mine: Any) -> list[Any]:
        """See `Comm.gather_objects`. Every rank."""
        return gather_objects(mine, self._group)

    def barrier(self) -> None:
        """See `Comm.barrier`. Every rank."""
        dist.barrier(group=self._group)

    def side_channel(self) -> Channel:
        """See `Comm.side_channel`: a gloo group on the host, whatever the tensors travel by. Every rank, the first."""
        if self._channel is None:
            self._channel = Channel(self.rank, self._group_beside("gloo"))
        return self._channel

    def open_reducer(self) -> Reducer:
        """See `Comm.open_reducer`. Every rank, the first time."""
        if self._reducer is None:
            self._reducer = Reducer(self.rank, self._group_beside())
        return self._reducer

    def host_mesh(self) -> DeviceMesh:
        """See `Comm.host_mesh`. Every rank, the first time."""
        if self._host_mesh is None and self._group is None:
            self._host_mesh = init_device_mesh("cpu", (self.world_size,))
        elif self._host_mesh is None:
            self._host_mesh = DeviceMesh.from_group(self.side_channel().group, "cpu")
        return self._host_mesh

    def close(self) -> None:
        """Destroys the process group if this object joined it. Every rank."""
        if self._joined and dist.is_initialized():
            # torch.distributed.checkpoint leaves a cycle that holds the group; freed at the interpreter's end, gloo's
            # thread is still running then and the process aborts
            gc.collect()
            dist.destroy_process_group()

    def _group_beside(self, backend: str | None = None) -> Any:
        """A new group of the same ranks, which alone take part in making it. Every rank."""
        ranks = None if self._group is None else dist.get_process_group_ranks(self._group)
        return dist.new_group(
            ranks, timeout=self._timeout, backend=backend, use_local_synchronization=self._group is not None
        )
