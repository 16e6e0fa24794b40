"""Gradients of bfloat16 parameters, summed in float32 over the passes of a step.

A gradient has its parameter's dtype, and so has the sum that autograd would leave in `.grad`: of 512 passes a bfloat16
sum, 8 bits, is wrong by a percent and more, since what is added is by then smaller than the last bit. So each pass's
gradient moves, as soon as it is complete, into a float32 sum, which is rounded once, after the last pass. A step of one
pass needs nothing of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loqt_scale.optim import when_gradient_is_complete


class Float32Sums:
    """Attaches itself to parameters, for as long as somebody holds it.

    Args:
        parameters: Everything that trains, bfloat16.
        local: The stored rows of a parameter or gradient.
        last_apart: The last pass's gradients stay in `.grad`, for somebody to `join` them to the sums.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], local: Callable[[Tensor], Tensor], *, last_apart: bool = False
    ) -> None:
        self._local, self._last_apart = local, last_apart
        self._sums: dict[Tensor, Tensor] = {}  # float32, of the stored rows
        self._stays = False  # what a pass leaves in `.grad`
        when_gradient_is_complete(parameters, self._take)

    @contextmanager
    def one_pass(self, *, last: bool) -> Iterator[None]:
        """Context of a pass; after the `last` one every sum is in its parameter's `.grad`, rounded. Local."""
        self._stays = last and self._last_apart
        yield
        self._stays = False
        if last:
            self._hand_over()

    def join(self, parameters: Iterable[Tensor], gradients: Tensor) -> Tensor:
        """Gradients of the last pass and the sums of those before it, which are forgotten. Local.

        Args:
            parameters: Whose they are.
            gradients: (V,), bfloat16, theirs one behind the other.

        Returns:
            (V,), float32, new.
        """
        total, at = gradients.float(), 0
        for parameter in parameters:
            sum_before = self._sums.pop(parameter, None)
            if sum_before is not None:
                total[at : at + parameter.numel()] += sum_before.view(-1)
            at += parameter.numel()
        return total

    def _take(self, parameter: Tensor) -> None:
        if self._stays:
            return
        assert parameter.grad is not None
        gradient = self._local(parameter.grad)
        sum_before = self._sums.get(parameter)
        self._sums[parameter] = gradient.float() if sum_before is None else sum_before.add_(gradient)
        parameter.grad = None

    @torch.no_grad()
    def _hand_over(self) -> None:
        """One at a time: the bfloat16 gradient comes as its float32 sum goes."""
        for parameter in list(self._sums):
            parameter.grad = torch.empty_like(parameter)
            self._local(parameter.grad).copy_(self._sums.pop(parameter))
