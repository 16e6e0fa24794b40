"""HSDP: groups of ranks that each store a whole model, sharded on dim 0 inside of the group.

A 2-D mesh, replicas x shards: a column holds copies of one shard, a row holds one model. Sketches are summed over all
ranks, for each reads its own sequences. Rows are shared out inside of a row of the mesh, and each row of it merges its
own copy. The copies must not drift, whatever kernels the ranks have: what was summed over shards, and what a merge
writes, is the first row's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from loqt_scale.strategies.comm import Comm
from loqt_scale.strategies.editing import ShardEditing
from loqt_scale.strategies.placement import Placement
from loqt_scale.strategies.process_group import GroupComm


def mesh_of(comm: GroupComm, shard_size: int) -> tuple[DeviceMesh, Comm, Comm | None]:
    """All ranks as a mesh, this rank's row of it, and its column if there is more than one row. Every rank.

    Args:
        comm: All ranks, in the order of their nodes: the first `shard_size` of them are the first row.
        shard_size: Ranks of a row; divides their number.
    """
    device = comm.device
    if shard_size == comm.world_size:
        return init_device_mesh(device.type, (shard_size,)), comm, None
    shape = (comm.world_size // shard_size, shard_size)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicas", "shards"))
    shards, replicas = (GroupComm(device, group=mesh.get_group(name)) for name in ("shards", "replicas"))
    return mesh, shards, replicas


class HybridEditing(ShardEditing):
    """See the module's docstring.

    Args:
        comm: All ranks of the mesh.
        placement: Where the parameters lie: its shards are the work shares.
        shards: The ranks of this rank's row of the mesh.
        replicas: Those of its column.
    """

    def __init__(self, comm: Comm, placement: Placement, *, shards: Comm, replicas: Comm) -> None:
        super().__init__(comm, placement)
        self._shards, self._replicas = shards, replicas
        self.work_rank, self.work_size = shards.rank, shards.world_size
        self._host_mesh: DeviceMesh | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        """See `Editing.sum`. Every rank. One all-reduce in the row, one broadcast in the column."""
        summed = self._shards.sum(tensor).contiguous()
        self._replicas.broadcast(summed, 0)
        return summed

    def gather_pieces(self, piece: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """See `Editing.gather_pieces`. Every rank. One all-gather in the row."""
        return self._shards.gather_pieces(piece, ranges)

    def as_shard(self, piece: Tensor, shape: Sequence[int]) -> Tensor:
        """See `Editing.as_shard`: one of the copies is saved. Every rank, the first time."""
        if self._host_mesh is None:
            self._host_mesh = init_device_mesh("cpu", (self._replicas.world_size, self._shards.world_size))
        whole, mesh = torch.empty(tuple(shape), device="meta"), self._host_mesh
        places = (Replicate(), Shard(0))
        return DTensor.from_local(piece, mesh, places, run_check=False, shape=whole.shape, stride=whole.stride())

    def write(self, parameter: Tensor, piece: Tensor) -> None:
        """The work share is what is stored. Every rank. One broadcast in the column."""
        agreed = piece.contiguous()
        self._replicas.broadcast(agreed, 0)
        super().write(parameter, agreed)
