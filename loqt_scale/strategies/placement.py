"""Where a model's parameters lie: who stores which of their rows. Dim 0 of a parameter counts its rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loqt_scale.functional.shares import shard_range
from loqt_scale.optim import RowShards


class Placement(ABC):
    """Who stores which rows.

    `shard_rank` and `shard_size` say which part of every parameter is this rank's: they are about memory. How many
    ranks share out a batch's sequences (`Step.data_size`), and who works on which rows in a merge (`Editing.rows`), are
    other questions: under ddp a rank stores all rows (1 of 1), and reads 1 of N shares of a batch.

    Args:
        device: Where this rank computes.
        row_shards: The ranks that together store each parameter once; default: this one alone does.
    """

    def __init__(self, device: torch.device, row_shards: RowShards | None = None) -> None:
        self.device, self.row_shards = device, row_shards or RowShards()

    @property
    def shard_rank(self) -> int:
        """This rank's place among those that together store each parameter once."""
        return self.row_shards.shard_rank

    @property
    def shard_size(self) -> int:
        """How many these are; 1: this rank stores everything."""
        return self.row_shards.shard_size

    @abstractmethod
    def shard(self, model: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        """Decides the placement of a meta-device model's parameters, before they are allocated. Every rank.

        Args:
            model: The model.
            blocks: Its transformer blocks, in the order of the forward pass.
        """

    def allocate(self, model: nn.Module) -> None:
        """Gives the parameters that are on the meta device storage without values. Local."""
        model.to_empty(device=self.device)

    def stored_rows(self, parameter: Tensor) -> tuple[int, int]:
        """Rows [start, stop) of `parameter` that this rank keeps in memory; a number is one row."""
        return shard_range(parameter.shape[0] if parameter.dim() else 1, self.shard_rank, self.shard_size)

    def settle(self) -> None:
        """Puts parameters back to where they are stored, if a forward pass has left them elsewhere. Local."""
        return

    @abstractmethod
    def local(self, tensor: Tensor) -> Tensor:
        """The stored rows of a parameter, gradient or optimizer state, as a plain tensor that shares its memory."""


class Replicated(Placement):
    """This rank stores everything.

    Args:
        device: Where it computes.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)

    def shard(self, model: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        """The model as it is."""
        return model

    def local(self, tensor: Tensor) -> Tensor:
        """The tensor."""
        return tensor
