"""Updates inside the backward pass: a gradient lives from its own computation to its own update.

Autograd (and FSDP2, after a block's reduce-scatter) calls a hook when a parameter's gradient is complete. Updating it
there and freeing the gradient at once means that gradients never pile up: at any time there are those of one layer.
The price: nothing that needs all gradients can come before the updates, neither clipping to a global norm nor skipping
a step whose norm is not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from loqt_scale.optim.hooks import when_gradient_is_complete
from loqt_scale.optim.streamed import StreamedAdamW


class UpdateInBackward:
    """Attaches itself to parameters, for as long as somebody holds it.

    Args:
        parameters: Everything that trains.
        optimizer: Updates one of them at a time.
        local: The stored rows of a gradient.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], optimizer: StreamedAdamW, local: Callable[[Tensor], Tensor]
    ) -> None:
        self._optimizer, self._local = optimizer, local
        self._squares: list[Tensor] = []
        when_gradient_is_complete(parameters, self._apply)

    def _apply(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._squares.append(torch.linalg.vector_norm(self._local(parameter.grad), dtype=torch.float32).square())
        self._optimizer.update(parameter)
        parameter.grad = None

    def take_squares(self) -> Tensor:
        """Sum of the squares of this rank's gradient rows since the last call, float32 scalar. Local."""
        squares, self._squares = self._squares, []
        return torch.stack(squares).sum()
