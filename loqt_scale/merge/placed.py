"""One layer's W_q, P and B as a strategy keeps them: read for the rows that this rank works on, and written back.

Nobody reads a whole W. `B` is exchanged only where its rows do not coincide with the rank's rows of W (a row group cut
by uneven shards).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from loqt_scale.functional.compensation import Compensated
from loqt_scale.functional.loftq import Packed, Shard
from loqt_scale.functional.quantization import unpack
from loqt_scale.layers import LoQTLayer
from loqt_scale.strategies import Editing


class InitialWeights(Protocol):
    """Where the weights before quantization can be read again (see `model.weights.WeightSource`)."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a parameter, float32."""
        ...


def initial_rows(source: InitialWeights, name: str, layer: LoQTLayer, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a layer's W before quantization, float32, the caller's own; of experts, of all of them.

    Args:
        source: Knows them under the names of the unconverted model.
        name: The layer's.
        layer: The layer.
        start: First row of W.
        stop: One past the last.
    """
    weight, spec = layer.weight_name(name), layer.spec
    if spec.experts is None:
        return source.rows(weight, start, stop)
    rows = spec.each.base.rows
    pieces = [
        source.rows(weight, expert, expert + 1)[0][max(start - expert * rows, 0) : stop - expert * rows]
        for expert in range(start // rows, -(-stop // rows) if stop > start else 0)
    ]
    return torch.cat(pieces) if pieces else torch.empty(0, spec.base.cols, dtype=torch.float32)


class PlacedLayer:
    """See the module's docstring.

    Args:
        layer: The layer.
        editing: How it is spread over ranks.

    Attributes:
        rows: Rows [start, stop) of W that this rank works on: whole groups.
    """

    def __init__(self, layer: LoQTLayer, editing: Editing) -> None:
        self.layer, self._editing = layer, editing
        self.rows = self._rows_of(editing.work_rank)

    def rows_of_basis(self, basis_FR: Tensor) -> Tensor:
        """P as this rank's rows of W need it: all of it on side input, those rows on side output. Local."""
        return basis_FR if self.layer.side == "input" else basis_FR[slice(*self.rows)]

    def shard(self, owner: int = 0, expert: int | None = None) -> Shard:
        """This rank's rows, of an expert, as `functional.loftq` wants them described; `owner`'s bits count. Local."""

        def agree(packed: Packed) -> Packed:
            for part in packed:
                if part is not None:
                    self._editing.broadcast(part, owner)
            return packed

        if expert is None:
            return Shard(self.layer.spec, self.rows[0], self._editing.sum, agree)
        each = self.layer.spec.each
        start = min(max(self.rows[0] - expert * each.base.rows, 0), each.base.rows)
        return Shard(each, start, self._editing.sum, agree)

    def packed_base(self) -> tuple[Tensor, Tensor | None]:
        """Codes and scales of this rank's rows of W_q. Every rank."""
        base = self.layer.base
        scales = None if base.scales is None else self._editing.read(base.scales)
        return self._editing.read(base.codes), scales

    def base(self) -> Tensor:
        """This rank's rows of dequant(W_q), float32. Every rank."""
        return unpack(*self.packed_base(), self.layer.spec.base, torch.float32, rows=self.rows[1] - self.rows[0])

    def basis(self) -> Tensor:
        """P on every rank, (F, r) float32. Every rank."""
        return unpack(*self.packed_basis(), self.layer.spec.projection, torch.float32)

    def packed_basis(self) -> Packed:
        """Codes and scales of P on every rank. Every rank."""
        packed = [self.layer.projection.codes, self.layer.projection.scales]
        codes, *scales = self._editing.gather_together([part for part in packed if part is not None])
        return codes, scales[0] if scales else None

    def factor(self) -> Tensor:
        """B as this rank's rows of W need it: those rows (input side) or all (output side), a float32 copy.

        Every rank.
        """
        factor, editing = self.layer.factor, self._editing
        if self.layer.side == "output":
            return editing.gather(factor).float().clone()
        if self._is_aligned:
            return editing.read(factor).detach().float().clone()
        return editing.gather(factor)[slice(*self.rows)].float().clone()

    def store_basis(self, codes: Tensor, scales: Tensor | None) -> None:
        """Replaces P by a packed one that every rank holds whole. Local."""
        projection = self.layer.projection
        self._editing.store(projection.codes, codes)
        if projection.scales is not None and scales is not None:
            self._editing.store(projection.scales, scales)

    def store(self, result: Compensated) -> None:
        """Replaces W_q and B by what this rank has found for its rows. Every rank."""
        editing, layer = self._editing, self.layer
        editing.write(layer.base.codes, result.codes)
        if layer.base.scales is not None and result.scales is not None:
            editing.write(layer.base.scales, result.scales)
        if layer.side == "output":
            editing.store(layer.factor, result.factor)
        elif self._is_aligned:
            editing.write(layer.factor, result.factor)
        else:
            ranges = [self._rows_of(rank) for rank in range(editing.work_size)]
            editing.store(layer.factor, editing.gather_pieces(result.factor, ranges))

    def _rows_of(self, rank: int) -> tuple[int, int]:
        layout = self.layer.spec.base
        return layout.rows_of_groups(*self._editing.rows(layout.groups, rank))

    @property
    def _is_aligned(self) -> bool:
        """Whether on every rank the rows of B are the rows of W that it works on, so that neither is exchanged."""
        total = self.layer.spec.base.rows
        return all(self._editing.rows(total, rank) == self._rows_of(rank) for rank in range(self._editing.work_size))
