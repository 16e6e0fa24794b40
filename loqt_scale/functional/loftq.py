"""A start that makes up for quantization: P and B from the singular vectors of what it rounds away (LoftQ).

LoftQ (Li et al., arXiv 2310.08659) alternates, beginning with L = 0,

    W_q <- Q(W - s L)        P <- the r leading singular vectors of R = W - dequant(W_q) on P's side, packed as stored
                             B <- argmin_B || R - s L(B) ||_F,    L = L(B), see `compensation`

and the round with the smallest error is kept. The first one is plain quantization with a factor beside it, so the error
is never larger than quantization's own.

R is noise for the most part, its singular values fall slowly, and a sketch in one pass would miss a good part of what a
rank can hold. Therefore a block of K = r + `SEARCH_COLUMNS` vectors goes through subspace iteration with R R^T (or
R^T R), from one round to the next: rounds change R little, so each of them goes on where the last has stopped.

As in `compensation` everything works on a *shard*, the rows of W that one rank holds, a chunk of rows at a time. What
leaves a shard are sums of K columns: F x K, and on side `output` C x K too (F is P's side of W, C the other one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loqt_scale.functional.compensation import (
    Compensated,
    SumOverShards,
    gram_inverse,
    plus_low_rank,
    row_chunks,
    taken_squares,
)
from loqt_scale.functional.low_rank_linear import LowRankSpec
from loqt_scale.functional.projection import SEARCH_COLUMNS, range_basis
from loqt_scale.functional.quantization import pack, unpack
from loqt_scale.functional.seeding import stable_seed

Packed = tuple[Tensor, Tensor | None]
FIRST_ITERATIONS = 3  # of the first round, which begins with random vectors; 1 in the others


@dataclass(frozen=True)
class Shard:
    """The rows of a layer's W that one rank works on.

    Args:
        spec: The layer's.
        start: The first row's place in W.
        sum: Adds a tensor up over the shards, giving the same result on all.
        agree: Makes a packed P, which every rank has found, the same on all to the last bit.
    """

    spec: LowRankSpec
    start: int = 0
    sum: SumOverShards = lambda tensor: tensor
    agree: Callable[[Packed], Packed] = lambda packed: packed


class Residual:
    """R = W - dequant(W_q) of a shard, never held dense.

    Args:
        shard: Its place.
        weight_NI: Its rows of W, float32.
        packed: Codes and scales of its rows of W_q.
    """

    def __init__(self, shard: Shard, weight_NI: Tensor, packed: Packed) -> None:
        self._shard, self._weight, self._packed = shard, weight_NI, packed

    def squares(self) -> Tensor:
        """||R||^2 of these rows, scalar. Local."""
        parts = [torch.linalg.vector_norm(residual).square() for _, _, residual in self._chunks()]
        return torch.stack([self._weight.new_zeros(()), *parts]).sum()

    def gram_times(self, block_FK: Tensor) -> Tensor:
        """R^T R block (side input) or R R^T block (side output), over all shards: (F, K). Every rank."""
        if self._shard.spec.side == "input":
            product = torch.zeros_like(block_FK)
            for _, _, residual in self._chunks():
                product.addmm_(residual.T, residual @ block_FK)
            return self._shard.sum(product)
        images_IK = self._transposed_times(block_FK[self._rows])
        product = torch.zeros_like(block_FK)
        mine = product[self._rows]
        for start, stop, residual in self._chunks():
            torch.mm(residual, images_IK, out=mine[start:stop])
        return self._shard.sum(product)

    def fit(self, basis_FR: Tensor) -> Tensor:
        """The best B beside P: this shard's rows (input side) or all of it (output side), (F_B, r). Every rank."""
        spec, pinv_FR = self._shard.spec, basis_FR @ gram_inverse(basis_FR.T @ basis_FR)
        if spec.side == "output":
            return self._transposed_times(pinv_FR[self._rows]).div_(spec.scale)
        factor = self._weight.new_zeros(self._weight.shape[0], basis_FR.shape[1])
        for start, stop, residual in self._chunks():
            torch.mm(residual, pinv_FR, out=factor[start:stop])
        return factor.div_(spec.scale)

    def _transposed_times(self, rows_NK: Tensor) -> Tensor:
        """R^T of something with W's rows, over all shards: (I, K). Every rank."""
        product = rows_NK.new_zeros(self._weight.shape[1], rows_NK.shape[1])
        for start, stop, residual in self._chunks():
            product.addmm_(residual.T, rows_NK[start:stop])
        return self._shard.sum(product)

    @property
    def _rows(self) -> slice:
        return slice(self._shard.start, self._shard.start + self._weight.shape[0])

    def _chunks(self) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, R[start:stop]) of these rows, one chunk after the other. Local."""
        layout, (codes, scales) = self._shard.spec.base, self._packed
        for start, stop in row_chunks(self._weight.shape[0], layout):
            groups = slice(start // layout.group_rows, -(-stop // layout.group_rows))
            part = None if scales is None else scales[groups]
            dequantized = unpack(codes[groups], part, layout, torch.float32, rows=stop - start)
            yield start, stop, torch.sub(self._weight[start:stop], dequantized, out=dequantized)


@dataclass(frozen=True)
class LowRank:
    """A P as a layer will hold it, with its B.

    Args:
        packed: Codes and scales of the whole P.
        basis: What they stand for, (F, r) float32.
        factor: B: this shard's rows (input side) or all of it (output side).
    """

    packed: Packed
    basis: Tensor
    factor: Tensor


def loftq(weight_NI: Tensor, shard: Shard, *, rounds: int, seed: int = 0) -> tuple[Compensated, Packed]:
    """W_q, P and B for one shard. Every rank must call it, ranks without rows too.

    Args:
        weight_NI: This shard's rows of W, float32; left unchanged.
        shard: Its place, its layer's layouts, side and scale.
        rounds: c, 1 or more.
        seed: Of the random vectors with which the search for P begins, and of P's background.

    Returns:
        (W_q and B of the best round with its error, codes and scales of the whole P).
    """
    rank, features = shard.spec.projection.cols, shard.spec.projection.rows
    block_FK = _random_block(features, rank, seed=seed, device=weight_NI.device)
    before: Tensor | None = None
    low_rank: LowRank | None = None
    best: tuple[Compensated, Packed] | None = None
    for index in range(rounds):
        packed = _quantize(weight_NI, shard, low_rank)
        residual = Residual(shard, weight_NI, packed)
        for _ in range(1 if index else FIRST_ITERATIONS):
            block_FK = residual.gram_times(torch.linalg.qr(block_FK)[0])
        low_rank = _fit(residual, shard, range_basis(block_FK, rank, seed=seed))
        plain, error = _errors(weight_NI, residual, shard, low_rank)
        before = plain if before is None else before
        if best is None or bool(error < best[0].error):
            best = Compensated(*packed, low_rank.factor, error, before), low_rank.packed
    assert best is not None
    return best


def _random_block(features: int, rank: int, *, seed: int, device: torch.device) -> Tensor:
    """Where the search begins: (F, K) standard normal, the same on every rank."""
    generator = torch.Generator(device=device).manual_seed(stable_seed("loftq", seed))
    return torch.randn(
        features, min(features, rank + SEARCH_COLUMNS), generator=generator, dtype=torch.float32, device=device
    )


def _quantize(weight_NI: Tensor, shard: Shard, low_rank: LowRank | None) -> Packed:
    """Q(W - s L) of this shard's rows, a chunk at a time; Q(W) without L. Local."""
    layout = shard.spec.base
    packed = []
    for start, stop in row_chunks(weight_NI.shape[0], layout):
        rows = weight_NI[start:stop]
        packed.append(pack(rows if low_rank is None else _minus(rows, shard, low_rank, start, stop), layout))
    if not packed:  # a shard without rows
        packed.append(pack(weight_NI, layout))
    codes, scales = zip(*packed, strict=True)
    return torch.cat(codes), None if scales[0] is None else torch.cat(scales)


def _minus(rows_nI: Tensor, shard: Shard, low_rank: LowRank, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of this shard of W, less s L. Local."""
    side, scale = shard.spec.side, shard.spec.scale
    basis = low_rank.basis[shard.start :] if side == "output" else low_rank.basis
    return plus_low_rank(rows_nI, basis, low_rank.factor, side, start, stop, scale=-scale)


def _fit(residual: Residual, shard: Shard, basis_FR: Tensor) -> LowRank:
    """P as it is stored, the same on all ranks, with the B that fits it. Every rank."""
    layout = shard.spec.projection
    packed = shard.agree(pack(basis_FR, layout))
    stored = unpack(*packed, layout, torch.float32)
    return LowRank(packed, stored, residual.fit(stored))


def _errors(weight_NI: Tensor, residual: Residual, shard: Shard, low_rank: LowRank) -> tuple[Tensor, Tensor]:
    """||R|| and ||R - s L||, relative to ||W||, over all shards. Every rank."""
    gram = low_rank.basis.T @ low_rank.basis
    taken = taken_squares(low_rank.factor, gram, shard.spec.scale)
    whole, squares = torch.linalg.vector_norm(weight_NI).square(), residual.squares()
    if shard.spec.side == "input":
        whole, squares, taken = shard.sum(torch.stack([whole, squares, taken]))
    else:  # every rank has all of B
        whole, squares = shard.sum(torch.stack([whole, squares]))
    whole = whole.clamp_min(1e-30)
    return (squares / whole).sqrt(), ((squares - taken).clamp_min(0.0) / whole).sqrt()
