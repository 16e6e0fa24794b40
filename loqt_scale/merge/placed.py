"""One layer's W_q, P and B as a strategy keeps them: read for the rows that this rank works on, and written back.

All of it happens inside `strategy.editing(layer.merged_parameters())`. Nobody reads a whole W. `B` is exchanged only
where its rows do not coincide with the rank's rows of W (a row group cut by uneven shards).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from loqt_scale.functional.compensation import Compensated
from loqt_scale.functional.loftq import Packed, Shard
from loqt_scale.functional.quantization import unpack
from loqt_scale.layers import LoQTLinear
from loqt_scale.strategies import Strategy


class InitialWeights(Protocol):
    """Where the weights before quantization can be read again (see `model.weights.WeightSource`)."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a parameter, float32."""
        ...


class PlacedLayer:
    """See the module's docstring.

    Args:
        layer: The layer.
        strategy: How it is spread over ranks.

    Attributes:
        rows: Rows [start, stop) of W that this rank works on: whole groups.
    """

    def __init__(self, layer: LoQTLinear, strategy: Strategy) -> None:
        self.layer, self._strategy = layer, strategy
        self.rows = self._rows_of(strategy.rank)

    def rows_of_basis(self, basis_FR: Tensor) -> Tensor:
        """P as this rank's rows of W need it: all of it on side input, those rows on side output. Local."""
        return basis_FR if self.layer.side == "input" else basis_FR[slice(*self.rows)]

    def shard(self, owner: int = 0) -> Shard:
        """This rank's rows as `functional.loftq` wants them described; `owner`'s bits count. Local."""

        def agree(packed: Packed) -> Packed:
            for part in packed:
                if part is not None:
                    self._strategy.broadcast(part, owner)
            return packed

        return Shard(self.layer.spec, self.rows[0], self._strategy.sum, agree)

    def packed_base(self) -> tuple[Tensor, Tensor | None]:
        """Codes and scales of this rank's rows of W_q. Every rank."""
        base = self.layer.base
        scales = None if base.scales is None else self._strategy.read(base.scales)
        return self._strategy.read(base.codes), scales

    def base(self) -> Tensor:
        """This rank's rows of dequant(W_q), float32. Every rank."""
        return unpack(*self.packed_base(), self.layer.spec.base, torch.float32, rows=self.rows[1] - self.rows[0])

    def basis(self) -> Tensor:
        """P on every rank, (F, r) float32. Every rank."""
        packed = [self.layer.projection.codes, self.layer.projection.scales]
        codes, *scales = self._strategy.gather_together([part for part in packed if part is not None])
        return unpack(codes, scales[0] if scales else None, self.layer.spec.projection, torch.float32)

    def factor(self) -> Tensor:
        """B as this rank's rows of W need it: those rows (input side) or all (output side), a float32 copy.

        Every rank.
        """
        factor, strategy = self.layer.factor, self._strategy
        if self.layer.side == "output":
            return strategy.gather(factor).float().clone()
        if self._is_aligned:
            return strategy.read(factor).detach().float().clone()
        return strategy.gather(factor)[slice(*self.rows)].float().clone()

    def store_basis(self, codes: Tensor, scales: Tensor | None) -> None:
        """Replaces P by a packed one that every rank holds whole. Local."""
        projection = self.layer.projection
        self._strategy.store(projection.codes, codes)
        if projection.scales is not None and scales is not None:
            self._strategy.store(projection.scales, scales)

    def store(self, result: Compensated) -> None:
        """Replaces W_q and B by what this rank has found for its rows. Every rank."""
        strategy, layer = self._strategy, self.layer
        strategy.write(layer.base.codes, result.codes)
        if layer.base.scales is not None and result.scales is not None:
            strategy.write(layer.base.scales, result.scales)
        if layer.side == "output":
            strategy.store(layer.factor, result.factor)
        elif self._is_aligned:
            strategy.write(layer.factor, result.factor)
        else:
            ranges = [self._rows_of(rank) for rank in range(strategy.world_size)]
            strategy.store(layer.factor, strategy.gather_pieces(result.factor, ranges))

    def _rows_of(self, rank: int) -> tuple[int, int]:
        layout = self.layer.spec.base
        return layout.rows_of_groups(*self._strategy.rows(layout.groups, rank))

    @property
    def _is_aligned(self) -> bool:
        """Whether on every rank the rows of B are the rows of W that it works on, so that neither is exchanged."""
        total = self.layer.spec.base.rows
        return all(self._strategy.rows(total, rank) == self._rows_of(rank) for rank in range(self._strategy.world_size))
