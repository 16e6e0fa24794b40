"""AdamW that takes one parameter at a time, a chunk of it at a time: for states and weights of fewer bits.

torch's fused AdamW is faster and is the default. This one serves where memory counts:

* `states: int8` keeps both moments as 8-bit codes (`functional.blockwise`); only a chunk of them is ever float32;
* parameters in bfloat16 are rounded at random (`functional.rounding`), so small updates are not lost;
* `compiled` makes one kernel of a chunk's update (`chunk_updates`), which is several times as fast;
* `update` applies a single parameter's gradient, so it can be called inside the backward pass.

Whether an update is to be left out may be known on the device only (`found_inf`, see `guarded`). So the count of
updates is a tensor there, and what hangs on it, bias corrections and the rounding's seed, is computed there too: the
host never waits. (Weights in host memory are updated by the host, which has to know.)

It works on the rows that a rank stores, as plain tensors, and every number is a function of the row: any number of
ranks makes the same updates. Under ZeRO, which replaces parameters by flat float32 tensors, it works on fragments of
them (`fragment`): the same numbers, but for blocks of 8-bit states that are cut, at most two for a parameter and rank.
With float32 states and parameters it is AdamW (Loshchilov and Hutter 2019) as in torch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loqt_scale.config import OptimizerStates
from loqt_scale.errors import UserError
from loqt_scale.functional.rounding import seed_from, seed_of_update
from loqt_scale.functional.seeding import stable_seed
from loqt_scale.optim.chunk_updates import AdamTerms, Update, Weights, adamw, in_one_kernel
from loqt_scale.optim.fragment import Chunk, Fragment, Moment
from loqt_scale.optim.row_shards import RowShards

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")


class StreamedAdamW(torch.optim.Optimizer):
    """See the module's docstring.

    A gradient scaler, or `step_if_finite`, sets `found_inf`, a float scalar on any device: not zero leaves weights,
    moments and counts as they are, bit for bit.

    `state` is by parameter, also where a flat tensor holds it: `step`, float64 scalar, `exp_avg` and `exp_avg_sq`,
    each a `Moment`.

    Args:
        groups: Parameter groups with `lr`.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        states: How the moments are kept.
        local: The stored rows of a parameter or gradient, as a plain tensor that shares its memory.
        first_row: Index, in the whole parameter, of the first stored row.
        seed: Of the random rounding.
        compiled: Whether torch.compile makes one kernel of an update (see `chunk_updates`).
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
        compiled: bool = False,
    ) -> None:
        super().__init__(list(groups), {"betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._states, self._local, self._first_row, self._seed = states, local, first_row, seed
        self._compiled = compiled
        self._skips: dict[torch.device, Tensor] = {}  # of one update
        self._seeds: dict[tuple[int, torch.device], Tensor] = {}
        self._adopted: dict[int, tuple[Tensor, Sequence[Fragment]]] = {}  # the tensor is kept so that its id stays
        self.number()

    def number(self) -> None:
        """Takes the parameters that the groups name now for its own; again where Accelerate's FSDP2 replaced them."""
        self._made_of = [p for group in self.param_groups for p in group["params"]]
        self._index_of = {id(p): index for index, p in enumerate(self._made_of)}
        self._group_index = {id(p): index for index, group in enumerate(self.param_groups) for p in group["params"]}

    def place(self, local: Callable[[Tensor], Tensor], first_row: Callable[[Tensor], int], shards: RowShards) -> None:
        """Says how the parameters are spread, where that was not known when this was made.

        Args:
            local: The stored rows of a parameter or gradient, as a plain tensor that shares its memory.
            first_row: Index, in the whole parameter, of the first stored row.
            shards: The ranks that each store a part of every parameter.
        """
        self._local, self._first_row = local, first_row

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch; what is added after this was made is its own as well."""
        super().add_param_group(param_group)
        if getattr(self, "_adopted", None) == {}:
            self.number()

    def adopt(self, flat: Tensor, fragments: Sequence[Fragment]) -> None:
        """Takes a flat tensor, which a group will name in the place of parameters, for the fragments that it holds.

        What no fragment holds, such as padding, is never touched. The moments are made at once, where there are values.

        Args:
            flat: (V,), float32.
            fragments: Of the parameters that the groups named before.
        """
        self._adopted[id(flat)] = flat, fragments
        for fragment in fragments:
            if fragment.values:
                self._begin(fragment, flat.device)

    def moment_names(self, parameter: Tensor) -> tuple[str, ...]:
        """Which moments a parameter has."""
        return ADAM_MOMENTS

    def ensure_state(self, parameter: Tensor) -> dict[str, Any]:
        """The state of a parameter, made of zeros if there is none."""
        state: dict[str, Any] = self.state[parameter]
        return state or self._begin(self._stored(parameter), self._local(parameter.detach()).device)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient. Local."""
        assert closure is None
        self._skips.clear()
        for group in self.param_groups:
            self._update(group["params"], group)

    @torch.no_grad()
    def update(self, parameter: Tensor) -> None:
        """Updates one parameter from its `.grad`, if it has one. Local."""
        self._skips.clear()
        self._update([parameter], self._group_of(parameter))

    def state_dict(self) -> dict[str, Any]:
        """As torch's: of each parameter `step` and its moments, float32, also of moments that are kept in 8 bits.

        A moment is shaped and sharded as its parameter; where an engine of DeepSpeed's has flattened it, (V,): the
        values that this rank holds. Parameters are numbered as they were when this was made.
        """
        held, self.state = self.state, defaultdict(dict)
        try:
            packed = super().state_dict()
        finally:
            self.state = held
        packed["state"] = {self._index_of[id(p)]: self._opened(p, own) for p, own in held.items() if own}
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned, on ranks that store the same values.

        Raises:
            UserError: A moment is missing, or has another shape.
        """
        held, saved = self.state, state_dict["state"]
        super().load_state_dict({**state_dict, "state": {}})
        self.state = held
        for key, parameter in zip(self._keys(state_dict), self._made_of, strict=True):
            if key in saved:
                self._take(parameter, saved[key])
            elif self._adopted:  # whose moments are there from the beginning
                self._take(parameter, None)
            else:
                self.state.pop(parameter, None)

    def _keys(self, state_dict: dict[str, Any]) -> Sequence[Any]:
        """By what a state dict calls this optimizer's parameters: numbers, or names if torch's checkpoints made it."""
        named = [key for group in state_dict["param_groups"] for key in group["params"]]
        keys = range(len(self._made_of)) if self._adopted else named  # an engine's groups hold flat tensors
        unknown = sorted(str(key) for key in set(state_dict["state"]) - set(keys))
        if unknown:
            raise UserError(
                f"{type(self).__name__}: the state to load has moments of {unknown[0]}, which no group holds"
            )
        return keys

    def _group_of(self, parameter: Tensor) -> dict[str, Any]:
        return self.param_groups[self._group_index[id(parameter)]]

    def _room(self, parameter: Tensor, moment: Moment) -> tuple[Tensor, Tensor]:
        """Zeros for a moment's values as they are saved, and this rank's part of them."""
        if self._adopted:
            values = moment.tensors()[0]
            room = torch.zeros(values.shape, dtype=torch.float32, device=values.device)
            return room, room
        room = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
        return room, self._local(room)

    def _opened(self, parameter: Tensor, own: dict[str, Any]) -> dict[str, Any]:
        """A parameter's state as it is saved."""
        opened = {"step": own["step"].clone()}
        for name in self.moment_names(parameter):
            opened[name], mine = self._room(parameter, own[name])
            own[name].read(mine)
        return opened

    def _take(self, parameter: Tensor, saved: dict[str, Any] | None) -> None:
        """Gives a parameter the state that was saved, or zeros."""
        own = self.state.get(parameter) or {}
        if not own and self._adopted:
            return  # other ranks hold its values
        own = own or self.ensure_state(parameter)
        own["step"].fill_(float(saved["step"]) if saved else 0.0)
        for name in self.moment_names(parameter):
            room, mine = self._room(parameter, own[name])
            if saved:
                mine = self._local(self._checked(parameter, name, saved.get(name), room, mine))
            own[name].write(mine.contiguous())

    def _checked(self, parameter: Tensor, name: str, value: Any, room: Tensor, mine: Tensor) -> Tensor:
        """A moment that was saved, if it has the shape that it should have, as a whole and on this rank."""
        good = isinstance(value, Tensor) and value.shape == room.shape and self._local(value).shape == mine.shape
        if not good:
            found = tuple(value.shape) if isinstance(value, Tensor) else "nothing"
            raise UserError(
                f"{type(self).__name__}: of parameter {self._index_of[id(parameter)]} the state has {found} for "
                f"{name!r}, but this rank holds {tuple(mine.shape)} of {tuple(room.shape)}; load what the same ranks "
                "have saved of the same model and optimizer"
            )
        checked: Tensor = value
        return checked

    def _begin(self, fragment: Fragment, device: torch.device) -> dict[str, Any]:
        state: dict[str, Any] = self.state[fragment.parameter]
        state["step"] = torch.zeros((), dtype=torch.float64, device=device)
        for name in self.moment_names(fragment.parameter):
            state[name] = Moment(fragment, self._states, signed=name == "exp_avg", device=device)
        return state

    def _stored(self, parameter: Tensor) -> Fragment:
        """The stored rows of a parameter that is a tensor of its own."""
        held = self._local(parameter.detach())
        rows, columns = parameter.shape[0] if parameter.dim() else 1, math.prod(held.shape[1:])
        first = self._first_row(parameter) * columns
        return Fragment(parameter=parameter, first=first, values=held.numel(), columns=columns, rows=rows)

    def _update(self, tensors: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Updates tensors that a group names."""
        for works in self._by_device(tensors):
            counts = self._count(works)
            for work, terms, noise in zip(works, _terms(counts, group), self._noises(works, counts), strict=True):
                first, second = (self.state[work.fragment.parameter][name] for name in ADAM_MOMENTS)
                for chunk in first.chunks():
                    weights = self._weights_of(work, chunk, noise)
                    self._run(adamw, weights, chunk.within(work.grad), first.stored(chunk), second.stored(chunk), terms)

    def _by_device(self, tensors: Sequence[Tensor]) -> Iterable[list[Work]]:
        """What this rank has to update of them, if there are values, by where these are."""
        found: dict[torch.device, list[Work]] = defaultdict(list)
        for work in self._work_of(tensors):
            if work.fragment.values:
                found[work.weight.device].append(work)
        return found.values()

    def _work_of(self, tensors: Sequence[Tensor]) -> Iterator[Work]:
        """What this rank has to update of tensors that a group names; nothing of those without a gradient."""
        for tensor in tensors:
            if tensor.grad is None:
                continue
            self._check_known(tensor)
            weights, gradients = self._local(tensor.detach()).view(-1), self._local(tensor.grad).reshape(-1)
            _, fragments = self._adopted.get(id(tensor)) or (tensor, [self._stored(tensor)])
            for part in fragments:
                yield Work(part, part.within(weights), part.within(gradients), self._skip_on(weights.device))

    def _skip_on(self, device: torch.device) -> Tensor | None:
        """Whether this update is to be left out, a bool scalar there; None: it is not."""
        if self.found_inf is None:
            return None
        if device not in self._skips:
            self._skips[device] = self.found_inf.to(device) != 0
        return self._skips[device]

    def _count(self, works: Sequence[Work]) -> Tensor:
        """Counts an update of each, unless it is left out; returns the counts, (n,) float64 on their one device."""
        if not works:
            return torch.zeros(0, dtype=torch.float64)
        steps, skip = [self.ensure_state(work.fragment.parameter)["step"] for work in works], works[0].skip
        torch._foreach_add_(steps, 1.0 if skip is None else [(~skip).double()] * len(steps))
        return torch.stack(steps)

    def _noises(self, works: Sequence[Work], counts: Tensor) -> Sequence[Tensor | None]:
        """Of each the seed by which an update that was counted rounds bfloat16 weights; None where they are float32."""
        rounded = [work.weight.dtype == torch.bfloat16 for work in works]
        if not any(rounded):
            return [None] * len(works)
        indices = (self._index_of[id(work.fragment.parameter)] for work in works)
        seeds = seed_of_update(torch.stack([self._seed_on(index, counts.device) for index in indices]), counts)
        return [seed if there else None for seed, there in zip(seeds.unbind(), rounded, strict=True)]

    def _seed_on(self, index: int, device: torch.device) -> Tensor:
        """Of the rounding of the index-th parameter, int64 scalar there."""
        if (index, device) not in self._seeds:
            seed = stable_seed("rounding", self._seed, index)
            self._seeds[index, device] = torch.full((), seed, dtype=torch.int64, device=device)
        return self._seeds[index, device]

    def _check_known(self, tensor: Tensor) -> None:
        """Refuses a tensor that took the place of parameters before anybody said what of them it holds."""
        if id(tensor) not in self._adopted and id(tensor) not in self._index_of:
            raise UserError(
                f"{type(self).__name__}: a group names a tensor {tuple(tensor.shape)} in the place of the parameters "
                "that this optimizer was made of, as an engine of DeepSpeed's or Accelerate's FSDP2 puts there; before "
                "the first step comes attach(model_or_engine, optimizer, config), or, of a model without LoQT layers, "
                "loqt_scale.strategies.place(model_or_engine, optimizer)"
            )

    def _weights_of(self, work: Work, chunk: Chunk, noise: Tensor | None) -> Weights:
        """A chunk's weights, to be replaced."""
        if noise is not None:
            noise = seed_from(noise, work.fragment.first + chunk.start)
        return Weights(chunk.within(work.weight), work.skip, noise, self._compiled)

    def _run(self, update: Update, *args: Any) -> None:
        (in_one_kernel(update) if self._compiled else update)(*args)


class Work(NamedTuple):
    """A fragment's values and gradients, (V,) both, and whether the update is to be left out (bool scalar)."""

    fragment: Fragment
    weight: Tensor
    grad: Tensor
    skip: Tensor | None


def _terms(counts: Tensor, group: dict[str, Any]) -> Iterator[AdamTerms]:
    """Of each count, (n,), to bits that do not depend on the others: which there are is the rank's own."""
    beta1, beta2 = group["betas"]
    decay = torch.full((), 1.0 - group["lr"] * group["weight_decay"], dtype=torch.float64, device=counts.device)
    apart = torch.stack([counts, counts], dim=1)[:, 0]  # side by side a CPU raises eight at a time, to other last bits
    roots = (1.0 - torch.pow(beta2, apart)).sqrt()
    rates = group["lr"] / (1.0 - torch.pow(beta1, apart))
    for root, rate in zip(roots.unbind(), rates.unbind(), strict=True):
        yield AdamTerms((beta1, beta2), group["eps"], decay, root, rate)
