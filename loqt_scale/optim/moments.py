"""Adam's moments, whichever optimizer keeps them: what a merge carries over and a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from loqt_scale.optim.streamed import StreamedAdamW

Moments = tuple[Tensor, Tensor]


@contextmanager
def open_moments(
    optimizer: torch.optim.Optimizer, parameter: Tensor, local: Callable[[Tensor], Tensor], *, edit: bool = True
) -> Iterator[Moments | None]:
    """(first, second) moment of a parameter, sharded as it is, to be read or edited in place inside the block.

    None before its first step, or without Adam's state. Moments kept in 8 bits are float32 inside the block only.

    Args:
        optimizer: The run's.
        parameter: One that trains.
        local: The stored rows of a tensor.
        edit: Whether they will be changed; if not, those kept in 8 bits are not packed again.
    """
    state = optimizer.state.get(parameter, {})
    if "exp_avg" not in state or "exp_avg_sq" not in state:
        yield None
    elif isinstance(optimizer, StreamedAdamW):
        opened = (_float_like(parameter), _float_like(parameter))
        packed = (state["exp_avg"], state["exp_avg_sq"])
        for moment, values in zip(packed, opened, strict=True):
            moment.read(local(values))
        yield opened
        for moment, values in zip(packed, opened, strict=True):
            if edit:
                moment.write(local(values))
    else:
        yield state["exp_avg"], state["exp_avg_sq"]


def ensure_adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Gives a parameter moments of zeros, as AdamW would at the first step, if it has none."""
    if isinstance(optimizer, StreamedAdamW):
        optimizer.ensure_state(parameter)
        return
    state = optimizer.state[parameter]
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def set_update_count(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Sets the number of updates that Adam's bias correction counts, for all parameters that have a state."""
    for state in optimizer.state.values():
        if state:  # DeepSpeed looks for one of each flat tensor, and leaves an empty one
            state["step"].fill_(float(updates))


def _float_like(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
