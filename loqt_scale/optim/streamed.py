"""AdamW that takes one parameter at a time, a chunk of rows at a time: for states and weights of fewer bits.

torch's fused AdamW is faster and is the default. This one serves where memory counts:

* `states: int8` keeps both moments as 8-bit codes (`functional.blockwise`); only a chunk of them is ever float32;
* parameters in bfloat16 are rounded at random (`functional.rounding`), so small updates are not lost;
* `update` applies a single parameter's gradient, so it can be called inside the backward pass.

Whether an update is to be left out may be known on the device only (`found_inf`, see `guarded`). So the count of
updates is a tensor there, and what hangs on it, bias corrections and the rounding's seed, is computed there too: the
host never waits. (Weights in host memory are updated by the host, which has to know.)

It works on the rows that a rank stores, as plain tensors, and every number is a function of the row: any number of
ranks makes the same updates. With float32 states and parameters it is AdamW (Loshchilov and Hutter 2019) as in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from loqt_scale.config import OptimizerStates
from loqt_scale.functional.blockwise import decode, encode, row_block
from loqt_scale.functional.rounding import seed_of_update, stochastic_bfloat16
from loqt_scale.functional.seeding import stable_seed

CHUNK_VALUES = 2**18  # values in flight: a dozen buffers of 1 MiB


class Moment:
    """One of Adam's moments for the stored rows of a parameter.

    Args:
        rows: The stored rows, (R, C).
        kind: `int8` keeps codes where a row can be cut into blocks, else float32.
        signed: True for the first moment; the second, never negative, is kept as its square root.
    """

    def __init__(self, rows: Tensor, kind: OptimizerStates, *, signed: bool) -> None:
        self._signed = signed
        self._block = row_block(rows.shape[1]) if kind == "int8" else 0
        self._values = torch.zeros(rows.shape, dtype=torch.uint8 if self._block else torch.float32, device=rows.device)
        self._scales: Tensor | None = None
        if self._block:
            self._scales = rows.new_zeros((rows.shape[0], rows.shape[1] // self._block), dtype=torch.float32)

    def tensors(self) -> list[Tensor]:
        """What is stored."""
        return [self._values] if self._scales is None else [self._values, self._scales]

    def load(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop), float32; may share this moment's memory."""
        if self._scales is None:
            return self._values[start:stop]
        values = decode(self._values[start:stop], self._scales[start:stop], signed=self._signed)
        return values if self._signed else values.square_()

    def store(self, start: int, values: Tensor, skip: Tensor | None = None) -> None:
        """Replaces rows from `start` on, unless `skip`, a bool scalar on their device, says that they stay."""
        stop = start + values.shape[0]
        if self._scales is None:
            _replace(self._values[start:stop], values, skip)
            return
        kept = values if self._signed else values.sqrt()
        codes, scales = encode(kept, self._block, signed=self._signed)
        _replace(self._values[start:stop], codes, skip)
        _replace(self._scales[start:stop], scales, skip)


class StreamedAdamW(torch.optim.Optimizer):
    """See the module's docstring.

    A gradient scaler, or `step_if_finite`, sets `found_inf`, a float scalar on any device: not zero leaves weights,
    moments and counts as they are, bit for bit.

    Args:
        groups: Parameter groups with `lr`.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        states: How the moments are kept.
        local: The stored rows of a parameter or gradient, as a plain tensor that shares its memory.
        first_row: Index, in the whole parameter, of the first stored row.
        seed: Of the random rounding.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        states: OptimizerStates,
        local: Callable[[Tensor], Tensor],
        first_row: Callable[[Tensor], int],
        seed: int,
    ) -> None:
        super().__init__(list(groups), {"betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._states, self._local, self._first_row, self._seed = states, local, first_row, seed
        every = [(p, group) for group in self.param_groups for p in group["params"]]
        self._group_of = {id(p): group for p, group in every}
        self._index_of = {id(p): index for index, (p, _) in enumerate(every)}

    def ensure_state(self, parameter: Tensor) -> dict[str, Any]:
        """The state of a parameter, made of zeros if there is none: `step`, `exp_avg`, `exp_avg_sq`."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            rows = _matrix(self._local(parameter.detach()))
            state["step"] = torch.zeros((), dtype=torch.float64, device=rows.device)
            state["exp_avg"] = Moment(rows, self._states, signed=True)
            state["exp_avg_sq"] = Moment(rows, self._states, signed=False)
        return state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient. Local."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                self.update(parameter)

    @torch.no_grad()
    def update(self, parameter: Tensor) -> None:
        """Updates one parameter from its `.grad`, if it has one. Local."""
        if parameter.grad is None:
            return
        state, group = self.ensure_state(parameter), self._group_of[id(parameter)]
        weight, grad = _matrix(self._local(parameter.detach())), _matrix(self._local(parameter.grad))
        skip = None if self.found_inf is None else self.found_inf.to(weight.device) != 0
        state["step"] += 1 if skip is None else ~skip
        first = self._first_row(parameter) * weight.shape[1]
        correction = _bias_correction(state["step"], group)
        for start, stop in _chunks(*weight.shape):
            old = weight[start:stop]
            new = _adamw(old.float(), grad[start:stop].float(), state, group, correction, (start, stop), skip)
            if weight.dtype == torch.bfloat16:
                seed = seed_of_update(stable_seed("rounding", self._seed, self._index_of[id(parameter)]), state["step"])
                new = stochastic_bfloat16(new, seed=seed, first_index=first + start * weight.shape[1])
            _replace(old, new, skip)

    def read_moments(self, parameter: Tensor, into: tuple[Tensor, Tensor]) -> None:
        """Copies both moments into float32 tensors shaped as the stored rows. Local."""
        state = self.ensure_state(parameter)
        for key, target in zip(("exp_avg", "exp_avg_sq"), into, strict=True):
            rows = _matrix(target)
            for start, stop in _chunks(*rows.shape):
                rows[start:stop].copy_(state[key].load(start, stop))

    def write_moments(self, parameter: Tensor, moments: tuple[Tensor, Tensor]) -> None:
        """Replaces both moments by float32 tensors shaped as the stored rows. Local."""
        state = self.ensure_state(parameter)
        for key, source in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            rows = _matrix(source)
            for start, stop in _chunks(*rows.shape):
                state[key].store(start, rows[start:stop])


def _bias_correction(step: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(root of the second moment's, learning rate over the first moment's): float64 scalars on the count's device."""
    beta1, beta2 = group["betas"]
    return (1.0 - torch.pow(beta2, step)).sqrt(), group["lr"] / (1.0 - torch.pow(beta1, step))


def _adamw(
    weight: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    correction: tuple[Tensor, Tensor],
    rows: tuple[int, int],
    skip: Tensor | None,
) -> Tensor:
    """One AdamW update of some rows: stores their new moments unless `skip`, returns their new weights (float32)."""
    beta1, beta2 = group["betas"]
    first = state["exp_avg"].load(*rows).lerp(grad, 1.0 - beta1)
    second = (state["exp_avg_sq"].load(*rows) * beta2).addcmul_(grad, grad, value=1.0 - beta2)
    denominator = second.sqrt().div_(correction[0]).add_(group["eps"])
    change = torch.div(first, denominator, out=denominator).mul_(correction[1])
    state["exp_avg"].store(rows[0], first, skip)
    state["exp_avg_sq"].store(rows[0], second, skip)
    return (weight * (1.0 - group["lr"] * group["weight_decay"])).sub_(change)


def _replace(old: Tensor, new: Tensor, skip: Tensor | None) -> None:
    """Overwrites `old`, unless `skip`."""
    old.copy_(new if skip is None else torch.where(skip, old, new))


def _matrix(rows: Tensor) -> Tensor:
    """Dim 0 by everything else."""
    return rows.unsqueeze(1) if rows.dim() == 1 else rows.flatten(1)


def _chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    size = max(1, CHUNK_VALUES // max(1, columns))
    return ((start, min(start + size, rows)) for start in range(0, rows, size))
