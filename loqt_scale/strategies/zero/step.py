"""A step by a DeepSpeed engine: it sums gradients, clips, and updates its float32 masters."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loqt_scale.strategies.comm import Comm
from loqt_scale.strategies.step import Step
from loqt_scale.strategies.zero.engine import ZeroEngine


class ZeroStep(Step):
    """See the module's docstring.

    Args:
        comm: The ranks.
        engine: DeepSpeed's.
    """

    def __init__(self, comm: Comm, engine: ZeroEngine) -> None:
        super().__init__(comm)
        self._engine = engine

    def wrap(self, model: nn.Module, optimizer: Optimizer) -> nn.Module:
        """Makes the engine, which takes over the optimizer's parameters and keeps its groups' settings. Every rank."""
        self._engine.start(model, optimizer, self.comm.rank)
        engine: nn.Module = self._engine.running
        return engine

    def sum_in_float32(self, parameters: Sequence[nn.Parameter]) -> None:
        """Never asked for: settings refuse bfloat16 parameters that train, whose masters are float32 here."""
        raise NotImplementedError("under ZeRO what trains is float32")

    def micro_step(self, model: nn.Module, *, last: bool) -> AbstractContextManager[object]:
        """Tells the engine whether gradients are complete after this pass."""
        self._engine.running.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def autocast(self) -> AbstractContextManager[object]:
        """None: under bf16 the engine's parameters are bf16 copies of float32 masters."""
        return nullcontext()

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        """The engine averages over ranks; our gradients are sums, so the loss is scaled up first. Every rank."""
        self._engine.running.backward(loss * self.data_size, scale_wrt_gas=False)

    def forward_alone(self, model: nn.Module) -> nn.Module | None:
        """See `Step.forward_alone`: stage 3 gathers each module for its forward pass."""
        return model if self._engine.stage < 3 else None

    def after_forward_only(self, model: nn.Module) -> None:
        """Nothing: without gradients the engine's hooks free what they have gathered."""

    def update(
        self, model: nn.Module, optimizer: Optimizer, parameters: Sequence[nn.Parameter], *, max_norm: float
    ) -> Tensor:
        """The engine clips (to its settings' norm) and applies; it skips what is not finite. Every rank."""
        self._engine.running.step()
        return torch.as_tensor(self._engine.running.get_global_grad_norm(), device=self.comm.device)
