"""What a parallel strategy must be able to do, and the strategy for one process, which is its plainest form.

A strategy answers four questions and nothing else in the package asks them:

1. *placement*: how is the model wrapped, and which rows of a parameter does this rank store?
   shard, allocate, wrap, stored_rows, local, row_shards
2. *work shares*: which rows does this rank work on in a merge, how do the results spread, and where are the moments?
   editing, rows, read, write, store, gather, edit_moments
3. *a step*: how are gradients summed over ranks and applied, and in which dtype does the forward pass run?
   sum_in_float32, micro_step, forward_alone, after_forward_only, autocast, backward, sum_step, update
4. *talk*: sums, broadcasts, barriers.
   sum, open_reducer, broadcast, barrier

Gradients are *summed* over ranks and micro-batches, never averaged: the trainer divides the loss by the step's token
count, so that unequal shares weigh by tokens. The chosen strategy is made once (`strategies.create`); nobody tests for
"is there one GPU?" afterwards.

All shapes below count dim 0 of a parameter as rows. "Every rank" marks collective calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from loqt_scale.functional.shares import shard_range
from loqt_scale.optim import RowShards, ensure_state, open_moments, step_if_finite
from loqt_scale.strategies.float32_sums import Float32Sums

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Channel:
    """Plain data between ranks, apart from the tensors' traffic: a background thread may use it. One process's.

    Args:
        rank: This rank.
        group: Process group of its own; None with one process.
    """

    def __init__(self, rank: int = 0, group: Any = None) -> None:
        self.rank, self.group = rank, group

    def gather_objects(self, mine: Any) -> list[Any]:
        """What each rank holds, by rank, on every rank. Every rank."""
        return [mine]


class Reducer:
    """Sums tensors over ranks into one rank's copy, apart from the strategy's own collectives. One process's.

    It may be used inside the backward pass, between the collectives that a strategy makes there; all ranks must call
    it in the same order.

    Args:
        rank: This rank.
    """

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.payload_bytes = 0  # of all tensors so far

    def begin(self, tensor: Tensor, owner: int) -> Callable[[], object]:
        """Begins to sum a tensor over ranks into `owner`'s copy, in place; the others' become meaningless. Every rank.

        Returns:
            Waits for it; until then nobody may touch the tensor.
        """
        return lambda: None


class Strategy:
    """One process, one device. Base of the others.

    Args:
        device: Where this rank computes.
        compute_dtype: float32, or bfloat16 for mixed precision over float32 parameters.
    """

    name = "single"
    _sums: Float32Sums | None = None

    def __init__(self, device: torch.device, compute_dtype: torch.dtype = torch.float32) -> None:
        self.device = device
        self.compute_dtype = compute_dtype
        self.rank = 0
        self.world_size = 1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs and files."""
        return self.rank == 0

    @property
    def description(self) -> str:
        """The strategy in a word or three, for people."""
        return self.name

    @property
    def engine_settings(self) -> dict[str, object] | None:
        """Settings that a foreign engine was given, for the run folder; None without one."""
        return None

    # ---- placement ---------------------------------------------------------------------------------------------

    def shard(self, model: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        """Decides the placement of a meta-device model's parameters, before they are allocated."""
        return model

    def allocate(self, model: nn.Module) -> None:
        """Gives the parameters that are on the meta device storage without values. Local."""
        model.to_empty(device=self.device)

    def wrap(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """The module to call in a step, once the parameters have their values. Every rank.

        Args:
            model: As `shard` returned it.
            optimizer: Over its parameters; a strategy may take over what it updates, not its settings.
        """
        return model

    @property
    def schedules_learning_rate(self) -> bool:
        """Whether the strategy moves the learning rates itself, in `update`; else the trainer does."""
        return False

    def stored_rows(self, parameter: Tensor) -> tuple[int, int]:
        """Rows [start, stop) of `parameter` that this rank keeps in memory (`rows` is about work)."""
        return 0, parameter.shape[0]

    def local(self, tensor: Tensor) -> Tensor:
        """The stored rows of a parameter, gradient or optimizer state, as a plain tensor that shares its memory."""
        return tensor

    @property
    def row_shards(self) -> RowShards:
        """The ranks that each store a part of every parameter; here each stores everything."""
        return RowShards()

    def set_schedule_position(self, steps: int) -> None:
        """Puts a scheduler of the strategy's own where `steps` updates would have put it."""

    # ---- work shares in a merge ----------------------------------------------------------------------------------

    def editing(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
        """Context in which these parameters can be read and replaced by the methods below. Every rank."""
        return nullcontext()

    def rows(self, total: int, rank: int | None = None) -> tuple[int, int]:
        """Rows [start, stop) out of `total` that a rank (default: this one) works on, whoever stores them."""
        return shard_range(total, self.rank if rank is None else rank, self.world_size)

    def read(self, parameter: Tensor) -> Tensor:
        """This rank's work share of a parameter; shares memory where it can."""
        start, stop = self.rows(parameter.shape[0])
        return self.local(parameter)[start:stop]

    def write(self, parameter: Tensor, piece: Tensor) -> None:
        """Replaces this rank's work share of a parameter, and sends it to whoever stores it. Every rank."""
        self.local(parameter).copy_(piece)

    def store(self, parameter: Tensor, whole: Tensor) -> None:
        """Replaces a parameter by a value that every rank holds whole: each keeps what it stores. No communication."""
        start, stop = self.stored_rows(parameter)
        self.local(parameter).copy_(whole[start:stop])

    def gather(self, parameter: Tensor) -> Tensor:
        """The whole parameter on every rank; for low-rank tensors only. Every rank."""
        return parameter.detach()

    def gather_together(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """`gather` of packed parameters with the same number of rows, in one collective if any. Every rank."""
        return [self.gather(parameter) for parameter in parameters]

    def gather_pieces(self, piece: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """Concatenates what each rank holds: rank i holds rows ranges[i] of the result. Every rank."""
        return piece

    def edit_moments(
        self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, edit: Callable[..., None]
    ) -> None:
        """Applies `edit` in place to a parameter's moments (see `open_moments`), if it has them yet. Every rank.

        `edit` gets whole rows, but which of them, and how many at a time, is the strategy's affair.
        """
        with open_moments(optimizer, parameter, self.local) as moments:
            if moments is not None:
                edit(*(self.local(moment) for moment in moments))

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def as_shard(self, piece: Tensor, shape: Sequence[int]) -> Tensor:
        """The rows that this rank writes to a checkpoint, with their place in the whole tensor.

        These are the rows that it works on (`rows`), not those that it stores (`stored_rows`): under ddp every rank
        stores all rows and writes 1/N of them. Every rank, the first time.

        Args:
            piece: The rows, on the host.
            shape: Of the whole tensor.

        Returns:
            What torch.distributed.checkpoint saves: `piece` itself if it is the whole.
        """
        return piece

    def read_moments(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[Tensor, ...] | None:
        """This rank's work shares of a parameter's moments; None before the first update. Every rank."""
        with open_moments(optimizer, parameter, self.local, edit=False) as moments:
            return None if moments is None else tuple(self.read(moment) for moment in moments)

    def write_moments(
        self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, moments: Sequence[Tensor]
    ) -> None:
        """Replaces the moments of a parameter, which may have none yet, by every rank's work shares. Every rank."""
        ensure_state(optimizer, parameter)
        with open_moments(optimizer, parameter, self.local) as ours:
            assert ours is not None
            for moment, piece in zip(ours, moments, strict=True):
                self.write(moment, piece)

    def gather_objects(self, mine: Any) -> list[Any]:
        """What each rank holds, by rank, on every rank; plain data only. Every rank."""
        return [mine]

    def side_channel(self) -> Channel:
        """A way to talk beside this one, the same at every call. Every rank, the first time."""
        return Channel()

    # ---- a step ----------------------------------------------------------------------------------------------------

    def sum_in_float32(self, parameters: Sequence[nn.Parameter]) -> None:
        """Has bfloat16 gradients summed in float32 over the passes of a step, from now on. Local."""
        self._sums = Float32Sums(parameters, self.local)

    def micro_step(self, model: nn.Module, *, last: bool) -> AbstractContextManager[object]:
        """Context of one forward and backward pass; gradients are summed over ranks in the `last` one of a step."""
        return nullcontext() if self._sums is None else self._sums.one_pass(last=last)

    def forward_alone(self, model: nn.Module) -> nn.Module | None:
        """What runs a model forward on this rank without the others; None: its weights are spread over them. Local."""
        return model

    def after_forward_only(self, model: nn.Module) -> None:
        """Undoes what a forward pass leaves for a backward pass that does not come. Local."""

    def autocast(self) -> AbstractContextManager[object]:
        """Context of the forward pass."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        """Adds a loss's gradients to those of this step. Every rank."""
        loss.backward()

    def sum_step(self, numbers: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Sums a step's numbers over ranks, between its last backward pass and `update`. Every rank. One all-reduce.

        What else ranks must agree on before the update, so that they judge its gradients alike, travels with them.

        Args:
            numbers: Any, float32 (n,).
            parameters: Everything that trains, with its gradients.

        Returns:
            (n,), the same on all ranks.
        """
        return self.sum(numbers)

    def update(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        *,
        max_norm: float,
    ) -> Tensor:
        """Clips the step's gradients to a global norm, applies and frees them; returns the norm before. Every rank.

        Args:
            model: What `wrap` returned.
            optimizer: The run's.
            parameters: Everything that trains.
            max_norm: Greatest norm; 0 does not clip. A norm that is not finite: nothing is applied.
        """
        norm = self.clip(parameters, max_norm)
        step_if_finite(optimizer, norm)
        optimizer.zero_grad(set_to_none=True)
        return norm

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Scales gradients to a global norm of at most `max_norm` (0: not at all); returns the old norm. Every rank."""
        kept = [p for p in parameters if p.grad is not None]
        norm = self.norm(kept)
        if max_norm > 0.0:
            torch.nn.utils.clip_grads_with_norm_(kept, max_norm, norm)
        return norm

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Norm of all gradients, the same on all ranks. Every rank."""
        return self.stored_norm(parameters)

    def stored_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Norm of the rows of gradients that this rank stores. Local."""
        return torch.nn.utils.get_total_norm([self.local(p.grad) for p in parameters if p.grad is not None])

    # ---- talk --------------------------------------------------------------------------------------------------------

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place where it can; the result is the same on all. Every rank."""
        return tensor

    def open_reducer(self) -> Reducer:
        """A way to sum tensors into one rank's copy beside all else, the same at every call. Every rank, the first."""
        return Reducer()

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Overwrites a tensor by `owner`'s, in place. Every rank."""

    def barrier(self) -> None:
        """Waits for all ranks. Every rank."""

    def close(self) -> None:
        """Leaves the process group, if this strategy joined one."""
