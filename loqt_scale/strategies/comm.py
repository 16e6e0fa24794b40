"""How ranks talk: sums, broadcasts, plain data. Whatever else a strategy does, its parts do it over one `Comm`.

"Every rank" marks collective calls: all ranks make them, in one order, or those that do wait for ever.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


class Channel:
    """Plain data between ranks, apart from the tensors' traffic: a background thread may use it.

    Args:
        rank: This rank.
        group: Process group of its own, of gloo; None with one process.
    """

    def __init__(self, rank: int = 0, group: Any = None) -> None:
        self.rank, self.group = rank, group

    def gather_objects(self, mine: Any) -> list[Any]:
        """What each rank holds, by rank, on every rank. Every rank."""
        return [mine] if self.group is None else gather_objects(mine, self.group)


class Reducer:
    """Sums tensors over ranks into one rank's copy, apart from all other collectives.

    It may be used inside the backward pass, between the collectives that a strategy makes there; all ranks must call
    it in the same order.

    Args:
        rank: This rank.
        group: Process group of its own: what is sent in it keeps its order. None with one process.
    """

    def __init__(self, rank: int = 0, group: Any = None) -> None:
        self.rank, self._group = rank, group
        self.payload_bytes = 0  # of all tensors so far

    def begin(self, tensor: Tensor, owner: int) -> Callable[[], object]:
        """Begins to sum a tensor over ranks into `owner`'s copy, in place; the others' become meaningless. Every rank.

        Returns:
            Waits for it; until then nobody may touch the tensor.
        """
        if self._group is None:
            return lambda: None
        work = dist.reduce(tensor, group_dst=owner, group=self._group, async_op=True)
        assert work is not None
        self.payload_bytes += tensor.nbytes
        wait: Callable[[], object] = work.wait
        return wait


class Comm(ABC):
    """All ranks of a run, and this one among them.

    Args:
        device: Where this rank computes.
        rank: This rank.
        world_size: How many there are.
    """

    def __init__(self, device: torch.device, rank: int = 0, world_size: int = 1) -> None:
        self.device, self.rank, self.world_size = device, rank, world_size

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs and files."""
        return self.rank == 0

    @abstractmethod
    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place where it can; the result is the same on all. Every rank."""

    @abstractmethod
    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Overwrites a tensor by `owner`'s, in place. Every rank."""

    @abstractmethod
    def gather_pieces(self, piece: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """Concatenates what each rank holds: rank i holds rows ranges[i] of the result. Every rank."""

    @abstractmethod
    def gather_objects(self, mine: Any) -> list[Any]:
        """What each rank holds, by rank, on every rank; plain data only. Every rank."""

    @abstractmethod
    def barrier(self) -> None:
        """Waits for all ranks. Every rank."""

    @abstractmethod
    def side_channel(self) -> Channel:
        """A way to talk beside this one, the same at every call. Every rank, the first time."""

    @abstractmethod
    def open_reducer(self) -> Reducer:
        """A way to sum tensors into one rank's copy beside all else, the same at every call. Every rank, the first."""

    @abstractmethod
    def host_mesh(self) -> DeviceMesh | None:
        """All ranks in a row, on the host, as checkpoints need them; None with one process. Every rank, the first."""

    @abstractmethod
    def close(self) -> None:
        """Leaves the process group, if this object joined one. Every rank."""


class SingleComm(Comm):
    """One process, which has nobody to talk to.

    Args:
        device: Where it computes.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._reducer = Reducer()

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor."""
        return tensor

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Nothing."""

    def gather_pieces(self, piece: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """The piece, which is the whole."""
        return piece

    def gather_objects(self, mine: Any) -> list[Any]:
        """This one's."""
        return [mine]

    def barrier(self) -> None:
        """Nothing."""

    def side_channel(self) -> Channel:
        """See `Comm.side_channel`."""
        return Channel()

    def open_reducer(self) -> Reducer:
        """See `Comm.open_reducer`."""
        return self._reducer

    def host_mesh(self) -> None:
        """None."""
        return None

    def close(self) -> None:
        """Nothing."""


def gather_objects(mine: Any, group: Any = None) -> list[Any]:
    """What each rank of a group (default: of all) holds, by rank, on every rank. Every rank of it."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return found
