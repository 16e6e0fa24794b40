"""The optimizer's moments, whichever keeps them: what a merge carries over and a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from loqt_scale.optim.streamed import ADAM_MOMENTS, StreamedAdamW

Moments = tuple[Tensor, ...]


def moment_names(optimizer: torch.optim.Optimizer, parameter: Tensor) -> tuple[str, ...]:
    """Under which names `optimizer.state[parameter]` holds moments, from its first step on: Adam's two, Muon's one."""
    return optimizer.moment_names(parameter) if isinstance(optimizer, StreamedAdamW) else ADAM_MOMENTS


@contextmanager
def open_moments(
    optimizer: torch.optim.Optimizer, parameter: Tensor, local: Callable[[Tensor], Tensor], *, edit: bool = True
) -> Iterator[Moments | None]:
    """A parameter's moments, (first, second) or (first,), sharded as it is, to be read or edited inside the block.

    None before its first step, or without such a state. Moments kept in 8 bits are float32 inside the block only.

    Args:
        optimizer: The run's.
        parameter: One that trains.
        local: The stored rows of a tensor.
        edit: Whether they will be changed; if not, those kept in 8 bits are not packed again.
    """
    state, names = optimizer.state.get(parameter, {}), moment_names(optimizer, parameter)
    if any(name not in state for name in names):
        yield None
    elif isinstance(optimizer, StreamedAdamW):
        packed = [state[name] for name in names]
        opened = tuple(_float_like(parameter) for _ in names)
        for moment, values in zip(packed, opened, strict=True):
            moment.read(local(values))
        yield opened
        for moment, values in zip(packed, opened, strict=True):
            if edit:
                moment.write(local(values))
    else:
        yield tuple(state[name] for name in names)


def ensure_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Gives a parameter moments of zeros, as the optimizer would at the first step, if it has none."""
    if isinstance(optimizer, StreamedAdamW):
        optimizer.ensure_state(parameter)
        return
    state = optimizer.state[parameter]
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state |= {name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in ADAM_MOMENTS}


def set_update_count(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Sets the number of updates that the optimizer counts, for all parameters that have a state."""
    for state in optimizer.state.values():
        if state:  # DeepSpeed looks for one of each flat tensor, and leaves an empty one
            state["step"].fill_(float(updates))


def _float_like(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
