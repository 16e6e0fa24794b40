"""An optimizer step: how gradients are summed over ranks and applied, in which dtype the forward pass runs.

Gradients are *summed* over ranks and micro-batches, never averaged: the trainer divides the loss by the step's token
count, so that unequal shares weigh by tokens. The trainer calls, in a step,

    for each micro-batch   micro_step: autocast: forward pass; backward
    once                   sum_step, update
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loqt_scale.optim import step_if_finite
from loqt_scale.strategies.comm import Comm
from loqt_scale.strategies.float32_sums import Float32Sums
from loqt_scale.strategies.placement import Placement


class Step(ABC):
    """What the loop asks of a strategy.

    Args:
        comm: The ranks.

    Attributes:
        data_rank: This rank's place among those that share out a batch's sequences.
        data_size: How many these are. (Who stores which rows is `Placement.shard_rank` of `shard_size`.)
    """

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self.data_rank, self.data_size = comm.rank, comm.world_size

    @abstractmethod
    def wrap(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        """The module to call in a step, once the parameters have their values. Every rank.

        Args:
            model: As `Placement.shard` returned it.
            optimizer: Over its parameters; a strategy may take over what it updates, not its settings.
        """

    # ---- passes ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def sum_in_float32(self, parameters: Sequence[nn.Parameter]) -> None:
        """Has bfloat16 gradients summed in float32 over the passes of a step, from now on. Local."""

    @abstractmethod
    def micro_step(self, model: nn.Module, *, last: bool) -> AbstractContextManager[object]:
        """Context of one forward and backward pass; gradients are summed over ranks in the `last` one of a step."""

    @abstractmethod
    def autocast(self) -> AbstractContextManager[object]:
        """Context of the forward pass."""

    @abstractmethod
    def backward(self, model: nn.Module, loss: Tensor) -> None:
        """Adds a loss's gradients to those of this step. Every rank."""

    @abstractmethod
    def forward_alone(self, model: nn.Module) -> nn.Module | None:
        """What runs a model forward on this rank without the others; None: its weights are spread over them. Local."""

    @abstractmethod
    def after_forward_only(self, model: nn.Module) -> None:
        """Undoes what a forward pass leaves for a backward pass that does not come. Local."""

    # ---- the end of a step -------------------------------------------------------------------------------------------

    def sum(self, numbers: Tensor) -> Tensor:
        """Sum over the ranks that read different sequences; the same on all ranks. Every rank. One all-reduce."""
        return self.comm.sum(numbers)

    def sum_step(self, numbers: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """`sum` of a step's numbers, between its last backward pass and `update`. Every rank. One all-reduce.

        What else ranks must agree on before the update, so that they judge its gradients alike, travels with them.

        Args:
            numbers: Any, float32 (n,).
            parameters: Everything that trains, with its gradients.

        Returns:
            (n,), the same on all ranks.
        """
        return self.sum(numbers)

    @abstractmethod
    def update(
        self, model: nn.Module, optimizer: Optimizer, parameters: Sequence[nn.Parameter], *, max_norm: float
    ) -> Tensor:
        """Clips the step's gradients to a global norm, applies and frees them; returns the norm before. Every rank.

        Args:
            model: What `wrap` returned.
            optimizer: The run's.
            parameters: Everything that trains.
            max_norm: Greatest norm; 0 does not clip. A norm that is not finite: nothing is applied.
        """


class OptimizerStep(Step):
    """A step by the run's own optimizer, over the rows that this rank stores. As it is, for one rank.

    Several need their gradients summed in the last pass (`micro_step`), and one norm (`norm`).

    Args:
        comm: The ranks.
        placement: Where the parameters lie.
        compute_dtype: float32, or bfloat16 for mixed precision over float32 parameters.
    """

    def __init__(self, comm: Comm, placement: Placement, compute_dtype: torch.dtype) -> None:
        super().__init__(comm)
        self.placement, self.compute_dtype = placement, compute_dtype
        self.sums: Float32Sums | None = None

    def wrap(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        """The model as it is."""
        return model

    def sum_in_float32(self, parameters: Sequence[nn.Parameter]) -> None:
        """See `Step.sum_in_float32`."""
        self.sums = Float32Sums(parameters, self.placement.local)

    def micro_step(self, model: nn.Module, *, last: bool) -> AbstractContextManager[object]:
        """See `Step.micro_step`."""
        return nullcontext() if self.sums is None else self.sums.one_pass(last=last)

    def autocast(self) -> AbstractContextManager[object]:
        """torch's, in the compute dtype."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.comm.device.type, dtype=self.compute_dtype)

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        """autograd's."""
        loss.backward()

    def forward_alone(self, model: nn.Module) -> nn.Module | None:
        """The model: this rank has all of it."""
        return model

    def after_forward_only(self, model: nn.Module) -> None:
        """Nothing."""

    def update(
        self, model: nn.Module, optimizer: Optimizer, parameters: Sequence[nn.Parameter], *, max_norm: float
    ) -> Tensor:
        """See `Step.update`. The host does not learn whether the step was applied: it does not wait for the device."""
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
        gradients = [self.placement.local(p.grad) for p in parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)
