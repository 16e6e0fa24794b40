"""What optimizers, ours and others', keep of a factor: by name what it is made of, so that a merge can carry it over.

    optimizer                             states                                   made of
    Adam, AdamW, NAdam, RAdam             exp_avg, exp_avg_sq                      gradients, squares
    with AMSGrad                          max_exp_avg_sq                           squares
    Adamax                                exp_avg, exp_inf                         gradients, magnitudes
    SGD, torch's Muon                     momentum_buffer                          gradients
    RMSprop                               square_avg, grad_avg, momentum_buffer    squares, gradients
    Adagrad, Adadelta                     sum; square_avg, acc_delta               squares
    Adafactor (transformers', torch's)    exp_avg_sq_row, _col; row_var, col_var   squares, summed over columns or rows
    bitsandbytes, 8 and 32 bits           state1, state2                           as its optimizer's

`functional.transport` has the rule for each. Any other state is refused, before anything is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from loqt_scale.errors import UserError
from loqt_scale.functional.transport import StateKind
from loqt_scale.optim.moments import moment_names, open_moments
from loqt_scale.optim.streamed import StreamedAdamW

_MOMENTS: dict[str, StateKind] = {
    **dict.fromkeys(("exp_avg", "momentum_buffer", "grad_avg"), "first"),
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta"), "second"),
    "exp_inf": "absolute",
    **dict.fromkeys(("exp_avg_sq_row", "row_var"), "rows"),
    **dict.fromkeys(("exp_avg_sq_col", "col_var"), "columns"),
}
_LIKE_B = ("first", "second", "absolute")  # kinds of states that have a value for each of B's
_BITSANDBYTES: dict[str, tuple[StateKind, ...]] = {
    **dict.fromkeys(("adam", "lamb"), ("first", "second")),
    **dict.fromkeys(("lion", "momentum", "lars"), ("first",)),
    **dict.fromkeys(("rmsprop", "adagrad"), ("second",)),
}
_PACKED_WITH = ("qmap1", "qmap2", "absmax1", "absmax2")
_BLOCK = 256  # values that share a scale in bitsandbytes' 8-bit states

OpenStates = list[tuple[StateKind, Tensor]]


def state_kinds(optimizer: Optimizer, parameter: Tensor, *, shaped: bool = True) -> dict[str, StateKind]:
    """Names of the states that a merge carries over, and what they are made of; empty before the first step.

    Args:
        optimizer: Any.
        parameter: One that it updates.
        shaped: False: `parameter` is flat and holds many, so there are no rows and no columns.

    Raises:
        UserError: There is a state without a rule.
    """
    state = optimizer.state.get(parameter, {})
    if isinstance(optimizer, StreamedAdamW):
        names = moment_names(optimizer, parameter)
        return dict(zip(names, ("first", "second"), strict=False)) if all(name in state for name in names) else {}
    tensors = {name for name, value in state.items() if isinstance(value, Tensor) and value.dim() > 0}
    known = _kinds_of(optimizer, state)
    unknown = sorted(name for name in tensors if name not in known and not _is_beside(name, state))
    unknown += sorted(name for name in tensors if known.get(name) in _LIKE_B and not _is_like(state[name], parameter))
    unknown += ["projector"] if "projector" in state else []  # GaLore's and APOLLO's moments, in a basis of their own
    if not shaped:
        unknown += sorted(name for name in tensors if known.get(name) in ("rows", "columns") or "qmap1" in state)
    if unknown:
        raise UserError(
            f"{type(optimizer).__name__} keeps '{unknown[0]}' of a factor, which a merge does not know how to carry "
            "into the new subspace; write loqt.merge.optimizer_state: reset (MergeConfig(optimizer_state='reset')), "
            "or train the factors by AdamW"
        )
    return {name: kind for name, kind in known.items() if name in tensors}


@contextmanager
def open_states(optimizer: Optimizer, parameter: Tensor, local: Callable[[Tensor], Tensor]) -> Iterator[OpenStates]:
    """A parameter's states with what they are made of, to be edited in place inside the block; empty without any.

    Those kept in 8 bits are float32 inside the block only.

    Args:
        optimizer: Any.
        parameter: One that it updates.
        local: The stored rows of a tensor.

    Raises:
        UserError: There is a state without a rule.
    """
    kinds = state_kinds(optimizer, parameter)
    if isinstance(optimizer, StreamedAdamW):
        with open_moments(optimizer, parameter, local) as moments:
            yield [(kind, local(moment)) for kind, moment in zip(kinds.values(), moments or (), strict=True)]
        return
    state = optimizer.state.get(parameter, {})
    opened = {name: _opened(state, name, local) for name in kinds}
    start = _starting_sum(optimizer, parameter) if "sum" in opened else 0.0
    if start:  # of every sum in every basis, so that what is carried is the rest
        opened["sum"].sub_(start)
    yield [(kind, opened[name]) for name, kind in kinds.items()]
    if start:
        opened["sum"].add_(start)
    for name, values in opened.items():
        if state[name].dtype == torch.uint8:
            _pack(state, name, values)


def forget_states(optimizer: Optimizer, parameter: Tensor) -> None:
    """Has the optimizer begin anew with a parameter, whatever it keeps of it. Local.

    It makes all of it again, with the values that it begins with (zeros would be wrong: Rprop's step sizes would stay
    at zero), and counts its steps again.
    """
    optimizer.state.pop(parameter, None)


def _starting_sum(optimizer: Optimizer, parameter: Tensor) -> float:
    """What Adagrad's sums begin with."""
    groups = (group for group in optimizer.param_groups if any(each is parameter for each in group["params"]))
    return float(next(groups, {}).get("initial_accumulator_value", 0.0))


def _is_like(state: Tensor, parameter: Tensor) -> bool:
    """Whether a state is one of torch's tensors, of its parameter's shape; torchao's packed ones are not."""
    return type(state).__module__.partition(".")[0] == "torch" and state.shape == parameter.shape


def _kinds_of(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, StateKind]:
    if "state1" not in state:
        return _MOMENTS
    kinds = _BITSANDBYTES.get(getattr(optimizer, "optimizer_name", ""), ())
    return dict(zip(("state1", "state2"), kinds, strict=False))


def _is_beside(name: str, state: dict[str, Any]) -> bool:
    """Whether a tensor only belongs to another one: a code book, scales, a norm."""
    return "state1" in state and (name in _PACKED_WITH or name == "unorm_vec")


def _opened(state: dict[str, Any], name: str, local: Callable[[Tensor], Tensor]) -> Tensor:
    values: Tensor = local(state[name])
    if values.dtype != torch.uint8:
        return values
    from bitsandbytes.functional import dequantize_blockwise

    number = name.removeprefix("state")
    opened: Tensor = dequantize_blockwise(
        values, absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=_BLOCK
    )
    return opened.float()


def _pack(state: dict[str, Any], name: str, values: Tensor) -> None:
    """Puts values back into 8 bits, with bitsandbytes' own code book and blocks."""
    from bitsandbytes.functional import quantize_blockwise

    number = name.removeprefix("state")
    codes, packed = quantize_blockwise(values.contiguous(), code=state[f"qmap{number}"], blocksize=_BLOCK)
    state[name].copy_(codes.view_as(state[name]))
    state[f"absmax{number}"].copy_(packed.absmax)
