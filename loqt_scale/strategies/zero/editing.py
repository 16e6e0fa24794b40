"""Parameters and moments inside a DeepSpeed engine, read and replaced by rows.

Stage 3 cuts tensors by elements, not by rows. Where N ranks divide the rows both are the same, and a rank's part is its
work share, read and written in its place. Elsewhere a packed tensor (never a dense weight) is gathered to be read, and
what ranks have found for their rows is gathered to be written, of which each keeps its part. What a run or a checkpoint
begins with is never gathered: each rank brings the rows that its part lies in (`rows_to_fill`).

B has three copies in the engine that must agree after a merge: the parameter (16 bit under bf16), its float32 master,
and the moments. The master is the true one: it is what is read, and written beside the parameter. Access is by
DeepSpeed's public calls (safe_get_* and safe_set_*), which know float32 moments only, and under stage 3 by the part
itself (`flat`). Moments in 8 bits are `StreamedAdamW`'s, of the fragments of parameters that this rank's flat masters
hold: decoded, summed into a whole and encoded again, a parameter at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from loqt_scale.errors import UserError
from loqt_scale.functional.transport import StateKind
from loqt_scale.optim import Fragment, StreamedAdamW, check_held, ensure_state, moment_names, state_kinds
from loqt_scale.strategies.comm import Comm
from loqt_scale.strategies.editing import Editing, EditStates
from loqt_scale.strategies.whole import whole_shape
from loqt_scale.strategies.zero.engine import RunningEngine
from loqt_scale.strategies.zero.flat import held_parameters, link_states, masters, stored_fragment


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

    def read(self, parameter: Tensor) -> Tensor:
        """This rank's work share; of the float32 master, where there is one. Every rank."""
        shape = whole_shape(parameter)
        start, stop = self.rows(shape[0])
        if self._part_is_rows(parameter):
            return self._part(parameter).view(stop - start, *shape[1:])
        return self.gather(parameter)[start:stop]

    def gather(self, parameter: Tensor) -> Tensor:
        """The whole parameter; the float32 master, where there is one. Every rank."""
        if self._has_master(parameter):
            master: Tensor = self._engine.deepspeed.utils.safe_get_full_fp32_param(parameter)
            return master
        if self._engine.stage < 3:
            return parameter.detach()
        part, shape = self._part(parameter), whole_shape(parameter)
        padded = part.numel() * self.comm.world_size
        return self.gather_shares(part, padded)[: shape.numel()].view(shape)

    def write(self, parameter: Tensor, piece: Tensor) -> None:
        """Gathers every rank's share, unless a rank keeps just these rows. Every rank. One all-gather, or none."""
        if self._part_is_rows(parameter):
            self._keep(parameter, piece.reshape(-1))
        else:
            self.store(parameter, self.gather_shares(piece, whole_shape(parameter)[0]))

    def store(self, parameter: Tensor, whole: Tensor) -> None:
        """Replaces a parameter and its float32 master by a value that every rank holds whole. No communication."""
        if self._engine.stage == 3:
            self._keep(parameter, self._stored(parameter).within_whole(whole.contiguous()))
            return
        parameter.copy_(whole)
        if self._has_master(parameter):
            self._set_state(parameter, whole, None)

    def rows_to_fill(self, parameter: Tensor) -> tuple[int, int]:
        """Stage 3: the rows in which this rank's part lies. Local."""
        return super().rows_to_fill(parameter) if self._engine.stage < 3 else self._stored(parameter).covering_rows

    def fill(self, parameter: Tensor, rows: Tensor) -> None:
        """See `Editing.fill`: each rank keeps its part of what it brings. Every rank. Under stage 3 local."""
        if self._engine.stage < 3:
            self.write(parameter, rows)
        else:
            self._keep(parameter, self._stored(parameter).within_rows(rows.contiguous()))
            if self.device.type == "cuda":  # the stream on which DeepSpeed gathers does not wait for this one
                torch.cuda.current_stream(self.device).synchronize()

    def _stored(self, parameter: Tensor) -> Fragment:
        """Stage 3: where this rank's part of a parameter lies in the whole. Local."""
        return stored_fragment(parameter, self.comm.rank)

    def _part_is_rows(self, parameter: Tensor) -> bool:
        """Whether on every rank what it keeps of a parameter is its work share. Local."""
        return self._engine.stage == 3 and whole_shape(parameter)[0] % self.comm.world_size == 0

    def _part(self, parameter: Any) -> Tensor:
        """Stage 3: this rank's part, padded, (V,); of the float32 master, where there is one. Local."""
        part = parameter.ds_tensor
        if self._has_master(parameter):
            part = self._engine.deepspeed.utils.safe_get_local_fp32_param(parameter)
        own: Tensor = part.detach().to(self.device)
        return own

    def _keep(self, parameter: Any, values: Tensor) -> None:
        """Stage 3: replaces this rank's part of a parameter and of its float32 master. Local."""
        parameter.partition()  # a copy that DeepSpeed has left gathered would be stale
        self._stored(parameter).within(parameter.ds_tensor).copy_(values)
        if self._has_master(parameter):
            self._set_part(parameter, values, None)

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
        start, stop = self.rows(whole_shape(parameter)[0])
        names = moment_names(optimizer, parameter)
        return tuple(self._whole_moment(optimizer, parameter, key)[start:stop].clone() for key in names)

    def write_moments(self, optimizer: Optimizer, parameter: nn.Parameter, moments: Sequence[Tensor]) -> None:
        """Gathers each moment whole; each rank keeps its shard. Every rank."""
        self._ensure_states(optimizer)
        rows = whole_shape(parameter)[0]
        for key, piece in zip(moment_names(optimizer, parameter), moments, strict=True):
            self._keep_moment(optimizer, parameter, key, self.gather_shares(piece, rows))

    def fill_moments(self, optimizer: Optimizer, parameter: nn.Parameter, moments: Sequence[Tensor]) -> None:
        """See `Editing.fill_moments`. Every rank. Under stage 3 local."""
        if self._engine.stage < 3:
            self.write_moments(optimizer, parameter, moments)
            return
        self._ensure_states(optimizer)
        stored = self._stored(parameter)
        for key, rows in zip(moment_names(optimizer, parameter), moments, strict=True):
            values = stored.within_rows(rows.contiguous())
            if not isinstance(optimizer, StreamedAdamW):
                self._set_part(parameter, values, key)
            elif stored.values:
                optimizer.state[parameter][key].write(values)

    def _whole_moment(self, optimizer: Optimizer, parameter: nn.Parameter, key: str) -> Tensor:
        """One of a parameter's moments, float32, on every rank. Every rank."""
        if not isinstance(optimizer, StreamedAdamW):
            moment: Tensor = self._engine.deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
            return moment
        whole = torch.zeros(whole_shape(parameter), dtype=torch.float32, device=self.device)
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
        utils = self._engine.deepspeed.utils
        if self._engine.stage == 3:  # DeepSpeed's call for whole values needs numbers of elements that N divides
            self._set_part(parameter, self._stored(parameter).within_whole(whole.contiguous()), key)
        elif key is None:
            utils.safe_set_full_fp32_param(parameter, whole.float())
        else:
            utils.safe_set_full_optimizer_state(parameter, whole.float(), key)

    def _set_part(self, parameter: Any, values: Tensor, key: str | None) -> None:
        """Stage 3: sets this rank's part of the master (key None) or of an optimizer state, which is padded. Local."""
        utils = self._engine.deepspeed.utils
        part = F.pad(values.float(), (0, parameter.ds_tensor.numel() - values.numel()))
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
