"""HSDP: groups of ranks that each store a whole model, sharded on dim 0 inside of the group.

A 2-D mesh, replicas x shards: a column holds copies of one shard, a row, a *replica*, holds one model. Sketches are
summed over all ranks, for each reads its own sequences. Layers of a merge are shared out over replicas: the replica
of the rank that has found a layer's P merges it, its ranks share out the rows, and hand on what they have written
along their columns. So the copies cannot drift, whatever kernels the ranks have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

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
    if shard_size == comm.world_size:
        return init_device_mesh(comm.device.type, (shard_size,)), comm, None
    shape = (comm.world_size // shard_size, shard_size)
    mesh = init_device_mesh(comm.device.type, shape, mesh_dim_names=("replicas", "shards"))
    replicas, shards = column_and_row(mesh, comm.device)
    return mesh, shards, replicas


def words(hosts: Sequence[str], shard_size: int) -> str:
    """How a model is spread, for people: "2 x 8", and over how many hosts a copy lies if these are several.

    Args:
        hosts: Of each rank. Launchers that deal ranks to nodes in turn (mpirun --map-by node) cut a copy across nodes.
        shard_size: Ranks of a copy.
    """
    copies = [set(hosts[first : first + shard_size]) for first in range(0, len(hosts), shard_size)]
    most = max(map(len, copies))
    return f"{len(copies)} x {shard_size}" + (f", each copy over {most} hosts" if most > 1 else "")


def column_and_row(mesh: DeviceMesh, device: torch.device) -> tuple[Comm, Comm]:
    """This rank's replicas and shards of a 2-D mesh. Every rank of it."""
    return GroupComm(device, group=mesh.get_group(0)), GroupComm(device, group=mesh.get_group(1))


class HybridEditing(ShardEditing):
    """See the module's docstring. "Every rank of it": of a replica.

    Args:
        comm: All ranks of the mesh. Every rank.
        placement: Where the parameters lie: its shards are the work shares.
        shards: The ranks of this rank's row of the mesh.
        replicas: Those of its column.
    """

    def __init__(self, comm: Comm, placement: Placement, *, shards: Comm, replicas: Comm) -> None:
        super().__init__(comm, placement)
        self._shards, self._replicas = shards, replicas
        self.work_rank, self.work_size = shards.rank, shards.world_size
        self.replica, self.replicas = replicas.rank, replicas.world_size
        self._places = comm.gather_objects((self.replica, self.work_rank))  # by rank of all
        self._host_mesh: DeviceMesh | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        """See `Editing.sum`. One all-reduce in the row."""
        return self._shards.sum(tensor)

    def gather_pieces(self, piece: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """See `Editing.gather_pieces`. One all-gather in the row."""
        return self._shards.gather_pieces(piece, ranges)

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """See `Editing.broadcast`. One broadcast in the row."""
        self._shards.broadcast(tensor, self._places[owner][1])

    def host_mesh(self) -> DeviceMesh:
        """See `Editing.host_mesh`: one of the copies is saved."""
        if self._host_mesh is None:
            self._host_mesh = init_device_mesh("cpu", (self._replicas.world_size, self._shards.world_size))
        return self._host_mesh

    def fill(self, parameter: Tensor, rows: Tensor) -> None:
        """See `Editing.fill`. One broadcast in the column: of the first replica's, whatever kernels packed it."""
        super().fill(parameter, rows)
        self.hand_on(parameter, 0)

    def replica_of(self, rank: int) -> int:
        """See `Editing.replica_of`."""
        return int(self._places[rank][0])

    def hand_on(self, tensor: Tensor, replica: int) -> None:
        """See `Editing.hand_on`. One broadcast in the column."""
        self._replicas.broadcast(self.placement.local(tensor), replica)

    def hand_on_whole(self, whole: Tensor | None, shape: Sequence[int], replica: int) -> Tensor:
        """See `Editing.hand_on_whole`. One broadcast in the column; an all-gather in the rows that had nothing."""
        start, stop = self.rows(shape[0])
        if whole is not None:
            self._replicas.broadcast(whole[start:stop].contiguous(), replica)
            return whole
        piece = torch.empty((stop - start, *shape[1:]), dtype=torch.float32, device=self.device)
        self._replicas.broadcast(piece, replica)
        return self.gather_shares(piece, shape[0])

    def gather_from_replicas(self, mine: Any) -> list[Any]:
        """See `Editing.gather_from_replicas`."""
        return self._replicas.gather_objects(mine)
