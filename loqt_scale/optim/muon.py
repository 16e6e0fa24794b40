"""Muon for the low-rank group, AdamW for the rest, one parameter or a few at a time, rows where they are.

    momentum    M <- mu M + (1 - mu) G,   U = mu M + (1 - mu) G      (Nesterov)
    step        B <- (1 - lr wd) B - lr 0.2 sqrt(max(N, r)) U Q      Q from U^T U (see `functional.orthogonal`)

It keeps one moment where Adam keeps two. What the ranks exchange is each layer's Gram matrix U^T U, r x r, those of a
few layers in one all-reduce; B, its momentum and its update stay with whoever stores the rows. P is orthonormal, so
making B's update orthogonal is the spectral step of W inside the subspace (Bernstein and Newhouse 2024).

Under ZeRO a rank's fragment may begin or end inside a row. Such rows are completed by one more message, of at most two
rows a rank and layer.

A dense weight (`method: full`) is a B like any other if it is tall. Of a wide one the rows' Gram matrix U U^T is the
smaller, and Q' U the same step; it needs whole rows against whole rows, so there, and only there, ranks exchange U.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loqt_scale.functional.orthogonal import gram, orthogonalizer, pack_symmetric, unpack_symmetric, update_scale
from loqt_scale.optim.chunk_updates import accelerate, descend
from loqt_scale.optim.row_shards import RowShards
from loqt_scale.optim.streamed import StreamedAdamW, Work

WAVE_VALUES = 2**23  # of B on this rank, about, whose updates are in flight together, unless one layer has more


def gram_side(rows: int, columns: int) -> tuple[int, bool]:
    """(size of the Gram matrix that a matrix takes, whether it is that of the rows)."""
    return (rows, True) if rows < columns else (columns, False)


class StreamedMuon(StreamedAdamW):
    """See the module's docstring; everything else is as in `StreamedAdamW`.

    Args:
        groups: Parameter groups with `lr`; those with `muon: True` hold matrices and take Muon's step.
        momentum: mu.
        shards: The ranks that each store a part of every matrix. Every one of them must take part in each step.
        **settings: Those of `StreamedAdamW`.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, momentum: float, shards: RowShards, **settings: Any
    ) -> None:
        super().__init__(groups, **settings)
        self._momentum, self._shards = momentum, shards

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch; without `muon: True` a group takes AdamW's step."""
        super().add_param_group({"muon": False, **param_group})

    def place(self, local: Callable[[Tensor], Tensor], first_row: Callable[[Tensor], int], shards: RowShards) -> None:
        """See `StreamedAdamW.place`."""
        super().place(local, first_row, shards)
        self._shards = shards

    def moment_names(self, parameter: Tensor) -> tuple[str, ...]:
        """Muon's one moment, or Adam's two."""
        return ("exp_avg",) if self._group_of(parameter)["muon"] else super().moment_names(parameter)

    def _update(self, tensors: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Updates tensors that a group names. Every rank of the shards, in the same order."""
        if not group["muon"]:
            super()._update(tensors, group)
            return
        work = list(self._work_of(tensors))
        for wave in muon_waves([(one.fragment.rows, one.fragment.columns) for one in work], self._shards.shard_size):
            self._orthogonal_update([work[index] for index in wave], group)

    def _orthogonal_update(self, wave: Sequence[Work], group: dict[str, Any]) -> None:
        """One update of matrices with Gram matrices of one size."""
        _, of_rows = gram_side(wave[0].fragment.rows, wave[0].fragment.columns)
        held = [work for work in wave if work.fragment.values]
        counts = self._count(held)
        pieces = [self._accelerate(work, whole=of_rows) for work in wave]
        self._complete(pieces, whole=of_rows)
        grams = torch.stack([gram(piece.matrix.T if of_rows else piece.begun_here) for piece in pieces])
        turns = orthogonalizer(grams if of_rows else self._sum(grams)).float()
        noises, rates = iter(self._noises(held, counts)), self._rates(pieces, group, grams.device)
        for work, piece, turn, rate in zip(wave, pieces, turns, rates, strict=True):
            if not work.fragment.values:
                continue
            piece.matrix = turn @ piece.matrix if of_rows else piece.matrix @ turn
            self._descend(work, piece, rate, next(noises))

    def _rates(
        self, pieces: Sequence[_Rows], group: dict[str, Any], device: torch.device
    ) -> Iterable[Sequence[float | Tensor]]:
        """(of the step, factor of the weights) of each; if compiled as scalars there, which are no constants."""
        decay = 1.0 - group["lr"] * group["weight_decay"]
        rates = [[group["lr"] * piece.update_scale, decay] for piece in pieces]
        if not self._compiled:
            return rates
        on_device = torch.tensor(rates, dtype=torch.float64, device="cpu").to(device, non_blocking=True)
        return [row.unbind() for row in on_device.unbind()]

    def _accelerate(self, work: Work, *, whole: bool) -> _Rows:
        """Updates the momentum and returns the rows of U that a fragment touches, or all."""
        piece = _Rows.of(work, whole=whole)
        if not work.fragment.values:  # this rank takes part in the sums only
            return piece
        moment = self.state[work.fragment.parameter]["exp_avg"]
        for chunk in moment.chunks():
            ahead = chunk.within(piece.values)
            self._run(accelerate, moment.stored(chunk), chunk.within(work.grad), ahead, self._momentum, work.skip)
        return piece

    def _descend(self, work: Work, piece: _Rows, rate: Sequence[float | Tensor], noise: Tensor | None) -> None:
        """Takes the step of `piece`, which is orthogonal now."""
        for chunk in self.state[work.fragment.parameter]["exp_avg"].chunks():
            weights = self._weights_of(work, chunk, noise)
            self._run(descend, weights, chunk.within(piece.values), *rate)

    def _sum(self, grams: Tensor) -> Tensor:
        """Sums Gram matrices over the shards. Every rank of them. One all-reduce."""
        if self._shards.shard_size == 1:
            return grams
        return unpack_symmetric(self._shards.sum(pack_symmetric(grams)), grams.shape[-1])

    def _complete(self, pieces: Sequence[_Rows], *, whole: bool) -> None:
        """Gives the rows of U the values that other ranks hold. Every rank. An all-reduce a matrix, if `whole`."""
        if self._shards.shard_size == 1:
            return
        if not whole:
            self._complete_rows(pieces)
            return
        for piece in pieces:
            piece.matrix = self._shards.sum(piece.matrix)

    def _complete_rows(self, pieces: Sequence[_Rows]) -> None:
        """Gives rows that the ranks' cuts go through the values that others hold. Every rank. One all-reduce, if any.

        Each rank sends its parts of the first and the last row that it touches, and which rows they are.
        """
        if not self._adopted:  # whole rows
            return
        columns = pieces[0].matrix.shape[1]
        sent = pieces[0].matrix.new_zeros(self._shards.shard_size, len(pieces), 2, columns + 1)
        for mine, piece in zip(sent[self._shards.shard_rank], pieces, strict=True):
            for slot, row in piece.cut_rows():
                mine[slot, :columns], mine[slot, columns] = piece.matrix[row], piece.first_row + row + 1
        sent = self._shards.sum(sent)
        for theirs, piece in zip(sent.unbind(1), pieces, strict=True):
            parts = theirs.reshape(-1, columns + 1)
            for _, row in piece.cut_rows():
                same = parts[:, columns:] == piece.first_row + row + 1
                piece.matrix[row] = torch.where(same, parts[:, :columns], 0.0).sum(0)


def muon_waves(shapes: Sequence[tuple[int, int]], shards: int) -> Iterator[list[int]]:
    """Which matrices are updated together: consecutive ones with Gram matrices of one kind, the same on all ranks.

    Args:
        shapes: (rows, columns) of the whole matrices.
        shards: Ranks that each store a part of them.

    Yields:
        Their indices.
    """
    wave: list[int] = []
    for index, shape in enumerate(shapes):
        side = gram_side(*shape)
        most = WAVE_VALUES * (1 if side[1] else shards)
        values = sum(math.prod(shapes[each]) for each in (*wave, index))
        if wave and (side != gram_side(*shapes[wave[0]]) or values > most):
            yield wave
            wave = []
        wave.append(index)
    if wave:
        yield wave


@dataclass
class _Rows:
    """The rows of a matrix that a fragment touches, or all, float32 (n, r); the first and the last may be cut.

    Args:
        matrix: The rows; zeros where other ranks hold the values.
        first_row: Index of the first in the whole matrix, up to 2^24.
        offset: Where the fragment begins in it.
        length: The fragment's values.
        update_scale: Of the whole matrix.
    """

    matrix: Tensor
    first_row: int
    offset: int
    length: int
    update_scale: float

    @classmethod
    def of(cls, work: Work, *, whole: bool) -> _Rows:
        """Zeros; of the whole matrix, or of the rows that are touched."""
        first, values, columns = work.fragment.first, work.fragment.values, work.fragment.columns
        if whole:
            matrix = torch.zeros(work.fragment.rows, columns, dtype=torch.float32, device=work.grad.device)
            return cls(matrix, 0, first, values, update_scale(work.fragment.rows, columns))
        offset = first % columns
        rows = -(-(offset + values) // columns) if values else 0
        matrix = torch.zeros(rows, columns, dtype=torch.float32, device=work.grad.device)
        return cls(matrix, first // columns, offset, values, update_scale(work.fragment.rows, columns))

    @property
    def values(self) -> Tensor:
        """The fragment's own, (V,); shares the matrix's memory."""
        return self.matrix.view(-1)[self.offset : self.offset + self.length]

    @property
    def begun_here(self) -> Tensor:
        """The rows whose first value the fragment holds: of all ranks, exactly one has it."""
        return self.matrix[1:] if self.offset else self.matrix

    def cut_rows(self) -> list[tuple[int, int]]:
        """(0 or 1, index) of the rows that are cut: the first, the last."""
        last = self.matrix.shape[0] - 1
        head = [(0, 0)] if self.offset and self.length else []
        open_end = (self.offset + self.length) % self.matrix.shape[1] != 0
        return head + ([(1, last)] if open_end and not (head and last == 0) else [])
