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

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from loqt_scale.optim import StreamedAdamW, ensure_state, moment_names
from loqt_scale.strategies.comm import Comm
from loqt_scale.strategies.editing import Editing
from loqt_scale.strategies.zero.engine import ZeroEngine
from loqt_scale.strategies.zero.flat import link_states, masters


class ZeroEditing(Editing):
    """See the module's docstring.

    Args:
        comm: The ranks.
        engine: DeepSpeed's.
    """

    def __init__(self, comm: Comm, engine: ZeroEngine) -> None:
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

    def edit_moments(self, optimizer: Optimizer, parameter: nn.Parameter, edit: Callable[..., None]) -> None:
        """Gathers the moments of a low-rank parameter, edits them on every rank, keeps the shards. Every rank."""
        if not _has_moments(optimizer):
            return
        names = moment_names(optimizer, parameter)
        moments = [self._whole_moment(optimizer, parameter, key) for key in names]
        edit(0, *moments)
        for key, moment in zip(names, moments, strict=True):
            self._keep_moment(optimizer, parameter, key, moment)

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
        if self._engine.stage < 3 and not self._linked:
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


def _has_moments(optimizer: Optimizer) -> bool:
    """False before the first update, on every rank alike; a `StreamedAdamW` has them, of zeros, from the beginning."""
    return isinstance(optimizer, StreamedAdamW) or bool(optimizer.state)


def _shape(parameter: Tensor) -> torch.Size:
    """The whole parameter's shape; stage 3 leaves an empty tensor in its place."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
