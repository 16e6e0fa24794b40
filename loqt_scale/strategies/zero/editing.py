"""Parameters and moments inside a DeepSpeed engine, read and replaced by rows.

DeepSpeed cuts tensors by elements, not by rows, so a rank's shard is of no use to a merge. A merge therefore takes one
layer at a time out of the shards (`open`: its packed bytes, never a dense weight), shares its rows out over the ranks
as DDP does, and puts the layer back. B has three copies in the engine that must agree afterwards: the parameter (16 bit
under bf16), its float32 master, and the moments. The master is the true one: it is what `gather` reads and `store`
writes, beside the parameter. Access is by DeepSpeed's public calls (GatheredParameters, safe_get_* and safe_set_*),
which know float32 moments only. Moments in 8 bits are `StreamedAdamW`'s, of the fragments of parameters that this
rank's flat masters hold (`flat`): decoded, summed into a whole and encoded again, a parameter at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from loqt_scale.errors import UserError
from loqt_scale.functional.transport import StateKind
from loqt_scale.optim import StreamedAdamW, check_held, ensure_state, moment_names, state_kinds
from loqt_scale.strategies.comm import Comm
from loqt_scale.strategies.editing import Editing, EditStates
from loqt_scale.strategies.zero.engine import RunningEngine
from loqt_scale.strategies.zero.flat import held_parameters, link_states, masters


class ZeroEditing(Editing):
    """See the module's docstring.

    Args:
        comm: The ranks.
        engine: DeepSpeed's.
    """

    keeps_masters = True

    def __init__(self, comm: Comm, engine: RunningEngine) -> None:
        super().__init__(comm)
        self._engine, self._linked = engine, False

    def open(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
        """Stage 3: gathers the parameters; at the end each rank keeps its shard of rank 0's values. Every rank."""
        if self._engine.stage < 3:
            return nullcontext()
        context: AbstractContextManager[object] = self._engine.deepspeed.zero.GatheredParameters(
            list(parameters), modifier_rank=0
        )
        return context

    def read(self, parameter: Tensor) -> Tensor:
        """This rank's work share; of the float32 master, where there is one. Every rank."""
        start, stop = self.rows(parameter.shape[0])
        return self.gather(parameter)[start:stop]

    def gather(self, parameter: Tensor) -> Tensor:
        """The whole parameter; the float32 master, where there is one. Every rank."""
        if not self._has_master(parameter):
            return parameter.detach()
        master: Tensor = self._engine.deepspeed.utils.safe_get_full_fp32_param(parameter)
        return master

    def write(self, parameter: Tensor, piece: Tensor) -> None:
        """Gathers every rank's share and stores it on every rank. Every rank. One all-gather."""
        self.store(parameter, self.gather_shares(piece, parameter.shape[0]))

    def store(self, parameter: Tensor, whole: Tensor) -> None:
        """Replaces a parameter and its float32 master by a value that every rank holds whole. No communication."""
        parameter.copy_(whole)
        if self._has_master(parameter):
            self._set_state(parameter, whole, None)

    def check_held(self, optimizers: Sequence[Optimizer], factors: Mapping[str, nn.Parameter]) -> None:
        """See `Editing.check_held`: the engine's groups count, once it has taken the optimizer's over."""
        if self._engine.running is not None:
            then = "engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=...)"
            check_held(factors, held_parameters(self._engine.running, self._engine.stage), then)

    def check_states(self, optimizer: Optimizer, parameter: nn.Parameter, *, shaped: bool = False) -> None:
        """See `Editing.check_states`: of the flat tensors, which have no rows and no columns."""
        self._kinds(optimizer, parameter)

    def forget_states(self, optimizer: Optimizer, parameter: nn.Parameter) -> None:
        """See `Editing.forget_states`: of flat tensors, of which a parameter's values are set to zero.

        Raises:
            UserError: They are kept in whole bytes.
        """
        self._link(optimizer)
        flat = next(each for each in optimizer.state if optimizer.state[each])
        states = {
            key: value for key, value in optimizer.state[flat].items() if isinstance(value, Tensor) and value.dim()
        }
        _refuse_what_zeros_spoil(optimizer, states)
        for key in states:
            whole = self._whole_moment(optimizer, parameter, key)
            self._keep_moment(optimizer, parameter, key, torch.zeros_like(whole))

    def edit_moments(self, optimizer: Optimizer, parameter: nn.Parameter, edit: EditStates) -> None:
        """Gathers the states of a low-rank parameter, edits them on every rank, keeps the shards. Every rank."""
        if not _has_moments(optimizer):
            return
        self._link(optimizer)
        kinds = self._kinds(optimizer, parameter)
        states = [(kind, self._whole_moment(optimizer, parameter, key)) for key, kind in kinds.items()]
        edit(0, states)
        for key, (_, state) in zip(kinds, states, strict=True):
            self._keep_moment(optimizer, parameter, key, state)

    def _kinds(self, optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, StateKind]:
        """Names of a parameter's states, and what they are made of. Local."""
        if isinstance(optimizer, StreamedAdamW):  # also of what this rank holds nothing of: all gather
            return dict(zip(moment_names(optimizer, parameter), ("first", "second"), strict=False))
        flat = next((each for each in optimizer.state if optimizer.state[each]), None)
        return {} if flat is None else state_kinds(optimizer, flat, shaped=False)

    def read_moments(self, optimizer: Optimizer, parameter: nn.Parameter) -> tuple[Tensor, ...] | None:
        """Work shares of the moments, gathered whole one after the other. Every rank."""
        if not _has_moments(optimizer):
            return None
        self._ensure_states(optimizer)
        start, stop = self.rows(_shape(parameter)[0])
        names = moment_names(optimizer, parameter)
        return tuple(self._whole_moment(optimizer, parameter, key)[start:stop].clone() for key in names)

    def write_moments(self, optimizer: Optimizer, parameter: nn.Parameter, moments: Sequence[Tensor]) -> None:
        """Gathers each moment whole; each rank keeps its shard. Every rank."""
        self._ensure_states(optimizer)
        rows = _shape(parameter)[0]
        for key, piece in zip(moment_names(optimizer, parameter), moments, strict=True):
            self._keep_moment(optimizer, parameter, key, self.gather_shares(piece, rows))

    def _whole_moment(self, optimizer: Optimizer, parameter: nn.Parameter, key: str) -> Tensor:
        """One of a parameter's moments, float32, on every rank. Every rank."""
        if not isinstance(optimizer, StreamedAdamW):
            moment: Tensor = self._engine.deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
            return moment
        whole = torch.zeros(_shape(parameter), dtype=torch.float32, device=self.device)
        fragment = self._engine.fragments.get(id(parameter))
        if fragment is not None:
            optimizer.state[parameter][key].read(fragment.within_whole(whole))
        return self.sum(whole)

    def _keep_moment(self, optimizer: Optimizer, parameter: nn.Parameter, key: str, whole: Tensor) -> None:
        """Replaces this rank's part of one of a parameter's moments by that of a whole one. Local."""
        if not isinstance(optimizer, StreamedAdamW):
            self._set_state(parameter, whole, key)
            return
        fragment = self._engine.fragments.get(id(parameter))
        if fragment is not None:
            optimizer.state[parameter][key].write(fragment.within_whole(whole.contiguous()))

    def _ensure_states(self, optimizer: Optimizer) -> None:
        """Makes float32 states, of the flat masters, where there has been no update yet; lets DeepSpeed find them."""
        if isinstance(optimizer, StreamedAdamW):
            return
        if not optimizer.state:
            for flat in masters(self._engine.running, self._engine.stage):
                ensure_state(optimizer, flat)
        self._link(optimizer)

    def _link(self, optimizer: Optimizer) -> None:
        """Stages 1 and 2: lets DeepSpeed find the states of every group, once. Local."""
        streamed = isinstance(optimizer, StreamedAdamW)
        if self._engine.stage < 3 and not self._linked and not streamed:
            link_states(self._engine.running)
            self._linked = True

    def _has_master(self, parameter: Tensor) -> bool:
        return self._engine.running is not None and parameter.requires_grad

    def _set_state(self, parameter: Tensor, whole: Tensor, key: str | None) -> None:
        """Sets this rank's part of the master (key None) or of an optimizer state from the whole value. Local."""
        utils, whole = self._engine.deepspeed.utils, whole.float()
        if self._engine.stage < 3:
            if key is None:
                utils.safe_set_full_fp32_param(parameter, whole)
            else:
                utils.safe_set_full_optimizer_state(parameter, whole, key)
            return
        # DeepSpeed's call for whole values needs numbers of elements that N divides; its shards are padded to that
        size = -(-whole.numel() // self.comm.world_size)
        part = whole.flatten()[self.comm.rank * size : (self.comm.rank + 1) * size]
        part = F.pad(part, (0, size - part.numel()))
        if key is None:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, key)


def _refuse_what_zeros_spoil(optimizer: Optimizer, states: Mapping[str, Tensor]) -> None:
    """Refuses states that do not begin at zero, before any is set to zero."""
    for key, value in states.items():
        if not value.is_floating_point():
            raise UserError(f"{type(optimizer).__name__} keeps '{key}' in {value.dtype}, which merges cannot set")
        if key in ("step_size", "ax"):
            raise UserError(
                f"{type(optimizer).__name__}'s '{key}' does not begin at zero, and in a DeepSpeed engine merges set "
                "states to zero only; train the factors by AdamW"
            )


def _has_moments(optimizer: Optimizer) -> bool:
    """False before the first update, on every rank alike; a `StreamedAdamW` has them, of zeros, from the beginning."""
    return isinstance(optimizer, StreamedAdamW) or bool(optimizer.state)


def _shape(parameter: Tensor) -> torch.Size:
    """The whole parameter's shape; stage 3 leaves an empty tensor in its place."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
