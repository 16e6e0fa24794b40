"""Parameters and moments, read and replaced: by merges, by checkpoints, by the weights that a run starts from.

The rows of a tensor are shared out over ranks, whoever stores them. A rank reads and writes its *work share*: `rows`.

    strategy   stores (`Placement`)   works on      so that `write`
    single     all rows               all rows      copies
    ddp        all rows               1/N of them   gathers: all replicas get the same bits, whoever computed them
    fsdp       1/N of the rows        the same      copies
    zero       1/N of the values      1/N of rows   gathers; copies where N ranks divide the rows under stage 3

Whoever can compute or read any rows, from a file say, need not send what somebody else stores: each rank brings the
rows `rows_to_fill`, and `fill` puts them in their place.

Under HSDP (`hybrid`) this is so inside of each *replica*, a group of ranks that stores the model once. What one replica
has found is handed on to the others (`hand_on`).

"Every rank" marks collective calls, "every rank of it" those of one replica.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from loqt_scale.functional.shares import shard_range
from loqt_scale.functional.transport import StateKind
from loqt_scale.optim import (
    check_held,
    ensure_state,
    forget_states,
    open_moments,
    open_states,
    parameters_of,
    state_kinds,
)
from loqt_scale.strategies.comm import Comm
from loqt_scale.strategies.placement import Placement
from loqt_scale.strategies.whole import whole_shape

EditStates = Callable[[int, Sequence[tuple[StateKind, Tensor]]], None]  # index of the first row, rows of each state


class Editing(ABC):
    """What merges and checkpoints ask of a strategy.

    Args:
        comm: The ranks.

    Attributes:
        work_rank: This rank's place among those that share out rows.
        work_size: How many these are: the ranks of a replica.
        replica: The replica that this rank has a part of.
        replicas: How many there are, each of which could do all the work alone.
        keeps_masters: Whether what trains has float32 copies that are updated in its place.
        keeps_gradients: Whether `.grad` of what trains stays where autograd has put it until the loop takes it away.
    """

    keeps_masters = False
    keeps_gradients = False
    replica, replicas = 0, 1

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self.work_rank, self.work_size = comm.rank, comm.world_size

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.comm.device

    # ---- work shares -------------------------------------------------------------------------------------------------

    def rows(self, total: int, rank: int | None = None) -> tuple[int, int]:
        """Rows [start, stop) out of `total` that a rank (default: this one) works on, whoever stores them."""
        return shard_range(total, self.work_rank if rank is None else rank, self.work_size)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that share out rows; the same on all of them. Every rank of it. One all-reduce."""
        return self.comm.sum(tensor)

    def gather_pieces(self, piece: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """Concatenates work shares: the rank at place i holds rows ranges[i] of the result. Every rank of it."""
        return self.comm.gather_pieces(piece, ranges)

    def gather_shares(self, piece: Tensor, total: int) -> Tensor:
        """Concatenates work shares as `rows` cuts them out of `total` rows. Every rank of it."""
        return self.gather_pieces(piece, [self.rows(total, rank) for rank in range(self.work_size)])

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Overwrites a tensor by that of rank `owner` of all, in place. Every rank of its replica."""
        self.comm.broadcast(tensor, owner)

    def as_shard(self, piece: Tensor, shape: Sequence[int]) -> Tensor:
        """The work share that this rank writes to a checkpoint, with its place in the whole tensor.

        It is not what the rank stores: under ddp every rank stores all rows and writes 1/N of them. Every rank, the
        first time.

        Args:
            piece: The rows, on the host.
            shape: Of the whole tensor.

        Returns:
            What torch.distributed.checkpoint saves: `piece` itself if it is the whole.
        """
        mesh = self.host_mesh()
        if mesh is None:
            return piece
        whole, places = torch.empty(tuple(shape), device="meta"), [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
        return DTensor.from_local(piece, mesh, places, run_check=False, shape=whole.shape, stride=whole.stride())

    def host_mesh(self) -> DeviceMesh | None:
        """The ranks that share out rows, on the host, in a row; copies of them below. Every rank, the first time."""
        return self.comm.host_mesh()

    # ---- replicas ----------------------------------------------------------------------------------------------------

    def replica_of(self, rank: int) -> int:
        """The replica of a rank of all. Local."""
        return 0

    def hand_on(self, tensor: Tensor, replica: int) -> None:
        """Overwrites what this rank stores of a tensor by what its like in a replica does, in place. Every rank."""
        return

    def hand_on_whole(self, whole: Tensor | None, shape: Sequence[int], replica: int) -> Tensor:
        """A tensor that each rank of a replica has whole, on all: a part is sent to each, and gathered. Every rank.

        Args:
            whole: The tensor, float32, in that replica; None elsewhere.
            shape: Of it.
            replica: Which.
        """
        assert whole is not None
        return whole

    def gather_from_replicas(self, mine: Any) -> list[Any]:
        """What this rank's likes in all replicas hold, by replica; plain data only. Every rank."""
        return [mine]

    # ---- parameters --------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Before a merge: puts parameters back to where they are stored, if they are elsewhere. Local."""
        return

    @abstractmethod
    def read(self, parameter: Tensor) -> Tensor:
        """This rank's work share of a parameter; shares memory where it can. Every rank."""

    @abstractmethod
    def write(self, parameter: Tensor, piece: Tensor) -> None:
        """Replaces this rank's work share of a parameter, and sends it to whoever stores it. Every rank of it.

        Other replicas keep theirs: `hand_on` makes them the same.
        """

    @abstractmethod
    def store(self, parameter: Tensor, whole: Tensor) -> None:
        """Replaces a parameter by a value that every rank holds whole: each keeps what it stores. No communication."""

    def clear(self, parameter: Tensor) -> None:
        """Sets a parameter to zero. Every rank. No communication."""
        self.store(parameter, torch.zeros(whole_shape(parameter), dtype=parameter.dtype, device=self.device))

    def rows_to_fill(self, parameter: Tensor) -> tuple[int, int]:
        """Rows [start, stop) that this rank brings when a parameter is filled: its work share, as a rule. Local."""
        return self.rows(whole_shape(parameter)[0])

    def fill(self, parameter: Tensor, rows: Tensor) -> None:
        """Replaces a parameter by what ranks bring of it, each its `rows_to_fill`. Every rank."""
        self.write(parameter, rows)

    @abstractmethod
    def gather(self, parameter: Tensor) -> Tensor:
        """The whole parameter on every rank; for low-rank tensors only. Every rank."""

    def gather_together(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """`gather` of packed parameters with the same number of rows, in one collective if any. Every rank."""
        return [self.gather(parameter) for parameter in parameters]

    # ---- the optimizer's moments -------------------------------------------------------------------------------------

    def check_held(self, optimizers: Sequence[Optimizer], factors: Mapping[str, nn.Parameter]) -> None:
        """Refuses factors that train, by layer's name, and that no optimizer holds (`optim.check_held`). Local."""
        check_held(factors, parameters_of(*optimizers))

    def check_states(self, optimizer: Optimizer, parameter: nn.Parameter, *, shaped: bool = True) -> None:
        """Refuses states of a parameter that a merge could not carry (`optim.state_kinds`). Local."""
        state_kinds(optimizer, parameter, shaped=shaped)

    def forget_states(self, optimizer: Optimizer, parameter: nn.Parameter) -> None:
        """Has the optimizer begin anew with a parameter, whatever it keeps of it. Every rank."""
        forget_states(optimizer, parameter)

    @abstractmethod
    def edit_moments(self, optimizer: Optimizer, parameter: nn.Parameter, edit: EditStates) -> None:
        """Applies `edit` in place to a parameter's states (see `open_states`), if it has them yet. Every rank.

        `edit` gets the index of the first row, then rows of each state; which of them is the strategy's affair.
        """

    @abstractmethod
    def read_moments(self, optimizer: Optimizer, parameter: nn.Parameter) -> tuple[Tensor, ...] | None:
        """This rank's work shares of a parameter's moments; None before the first update. Every rank."""

    @abstractmethod
    def write_moments(self, optimizer: Optimizer, parameter: nn.Parameter, moments: Sequence[Tensor]) -> None:
        """Replaces the moments of a parameter, which may have none yet, by every rank's work shares. Every rank."""

    def fill_moments(self, optimizer: Optimizer, parameter: nn.Parameter, moments: Sequence[Tensor]) -> None:
        """As `write_moments`, of the rows `rows_to_fill`. Every rank."""
        self.write_moments(optimizer, parameter, moments)


class ReplicaEditing(Editing):
    """Every rank stores everything; what each has found for its work share is gathered.

    Args:
        comm: The ranks.
        placement: Where the parameters lie.
    """

    keeps_gradients = True

    def __init__(self, comm: Comm, placement: Placement) -> None:
        super().__init__(comm)
        self.placement = placement

    def settle(self) -> None:
        """See `Editing.settle`."""
        self.placement.settle()

    def read(self, parameter: Tensor) -> Tensor:
        """A view. Local."""
        start, stop = self.rows(parameter.shape[0])
        return self.placement.local(parameter)[start:stop]

    def write(self, parameter: Tensor, piece: Tensor) -> None:
        """Gathers every rank's share and stores it on every rank. Every rank. One all-gather."""
        self.store(parameter, self.gather_shares(piece, parameter.shape[0]))

    def store(self, parameter: Tensor, whole: Tensor) -> None:
        """See `Editing.store`."""
        start, stop = self.placement.stored_rows(parameter)
        self.placement.local(parameter).copy_(whole[start:stop])

    def gather(self, parameter: Tensor) -> Tensor:
        """The parameter. Local."""
        return parameter.detach()

    def edit_moments(self, optimizer: Optimizer, parameter: nn.Parameter, edit: EditStates) -> None:
        """Each rank edits the rows that it stores. Local."""
        with open_states(optimizer, parameter, self.placement.local) as states:
            edit(self.placement.stored_rows(parameter)[0], states)

    def read_moments(self, optimizer: Optimizer, parameter: nn.Parameter) -> tuple[Tensor, ...] | None:
        """See `Editing.read_moments`."""
        with open_moments(optimizer, parameter, self.placement.local, edit=False) as moments:
            return None if moments is None else tuple(self.read(moment) for moment in moments)

    def write_moments(self, optimizer: Optimizer, parameter: nn.Parameter, moments: Sequence[Tensor]) -> None:
        """See `Editing.write_moments`."""
        ensure_state(optimizer, parameter)
        with open_moments(optimizer, parameter, self.placement.local) as ours:
            assert ours is not None
            for moment, piece in zip(ours, moments, strict=True):
                self.write(moment, piece)


class ShardEditing(ReplicaEditing):
    """Every rank works on the rows that it stores: what a merge writes need not be sent.

    Args:
        comm: The ranks.
        placement: Where the parameters lie: its shards are the work shares.
    """

    keeps_gradients = False

    def read(self, parameter: Tensor) -> Tensor:
        """The stored shard is the work share. Local."""
        return self.placement.local(parameter)

    def write(self, parameter: Tensor, piece: Tensor) -> None:
        """The work share is what is stored. Local."""
        self.placement.local(parameter).copy_(piece)

    def gather(self, parameter: Tensor) -> Tensor:
        """One all-gather. Every rank."""
        return self.gather_shares(self.placement.local(parameter.detach()), parameter.shape[0])

    def gather_together(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """One all-gather: rows side by side."""
        widths = [parameter.shape[1] for parameter in parameters]
        rows = torch.cat([self.placement.local(parameter.detach()) for parameter in parameters], dim=1)
        parts = self.gather_shares(rows, parameters[0].shape[0]).split(widths, dim=1)
        return [part.contiguous() for part in parts]  # packed bytes are read in order
