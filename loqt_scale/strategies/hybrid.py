"""HSDP: groups of ranks that each store a whole model, sharded on dim 0 inside of the group.

A 2-D mesh, replicas x shards: a column holds copies of one shard, a row holds one model. Sketches are summed over all
ranks, for each reads its own sequences. Rows are shared out inside of a row of the mesh, and each row of it merges its
own copy. The copies must not drift, whatever kernels the ranks have: what was summed over shards, and what a merge
writes, is the first row's.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from loqt_scale.strategies.comm import Comm
from loqt_scale.strategies.fsdp import ShardEditing
from loqt_scale.strategies.placement import Placement


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

    def sum(self, tensor: Tensor) -> Tensor:
        """See `Editing.sum`. Every rank. One all-reduce in the row, one broadcast in the column."""
        summed = self._shards.sum(tensor).contiguous()
        self._replicas.broadcast(summed, 0)
        return summed

    def gather_pieces(self, piece: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """See `Editing.gather_pieces`. Every rank. One all-gather in the row."""
        return self._shards.gather_pieces(piece, ranges)

    def write(self, parameter: Tensor, piece: Tensor) -> None:
        """The work share is what is stored. Every rank. One broadcast in the column."""
        agreed = piece.contiguous()
        self._replicas.broadcast(agreed, 0)
        super().write(parameter, agreed)
