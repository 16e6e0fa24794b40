"""A hook that is called when a parameter's gradient of a backward pass is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from weakref import WeakMethod

from torch import Tensor, nn


def when_gradient_is_complete(parameters: Iterable[nn.Parameter], act: Callable[[Tensor], None]) -> None:
    """Has autograd (and FSDP2, after a reduce-scatter) call `act` with each parameter whose `.grad` is complete.

    Args:
        parameters: Leaves.
        act: A method, called for as long as somebody else holds its object: Python's garbage collector does not see
            through a tensor's hooks, and would keep the object, and what it holds, for ever.
    """
    weak = WeakMethod(act)

    def complete(parameter: Tensor) -> None:
        alive = weak()
        if alive is not None:
            alive(parameter)

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(complete)
