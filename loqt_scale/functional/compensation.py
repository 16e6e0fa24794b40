"""Fitting a quantized base and a factor to one weight: what happens inside a merge.

Given are the merged weight W (float32), a new basis P and the scale s. Wanted are W_q and B with

    W  ~  dequant(W_q) + s L(B)        L(B) = B P^T on side `input`, P B^T on side `output` (B is tall on both)

Each of the c rounds fixes B and quantizes, then fixes W_q and fits B to the error that quantization has left:

    round 0            B = 0                      W_q <- Q(W)
    every round        R = W - dequant(W_q)       B   <- argmin_B || R - s L(B) ||_F
    rounds 1, 2, ...                              W_q <- Q(W - s L(B')), with B of the round before and beyond it:
                                                  B' = B + 1/2 (B - B of the round before that)

(LoQT, algorithm 2, where B' is B; LoftQ uses the same idea.) B moves a long way in one direction before it settles, and
B' is over-relaxation: three rounds of it end nearer to W than five without. Rounds need not improve, so the round with
the smallest error is kept. Gains shrink by about the same factor from round to round, so the last round is the one
after which less than `SETTLED` is to be expected. Plain quantization, W_q of round 0 with B = 0, competes too:
compensation never hurts.

The fit has a closed form. It uses P^+ = (P^T P)^-1 P^T of the P that the layer will hold, which is quantized itself and
so not exactly orthonormal:

    B = R P^+T / s (input)      B = R^T P^+T / s (output)      || R - s L(B) ||^2 = || R ||^2 - s^2 tr(B^T B P^T P)

A rank calls this with its *shard*, the rows of W that it works on, and works through them in chunks of rows: scratch
memory is one chunk, not a second W. On side `input` the rows of B are the rows of W, so a rank finds its part of B
alone. On side `output` B is a sum over the ranks' rows. So each round has one sum over ranks: of three numbers (input),
or of B and two numbers (output). The caller passes it as `sum_over_shards`; with the identity the shard is all of W.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from loqt_scale.functional.quantization import MatrixLayout, pack, unpack

SumOverShards = Callable[[Tensor], Tensor]
Result = TypeVar("Result")
CHUNK_VALUES = 2**20  # dense values in flight: 4 MiB a buffer
BEYOND = 0.5  # over-relaxation: of B's last change (1: the error grows again after three rounds)
SETTLED = 0.05  # no round is made that is expected to lower the error by a smaller share


@dataclass(frozen=True)
class Compensated:
    """The best round.

    Args:
        codes: Packed rows of this shard.
        scales: Their scales, or None.
        factor: B, float32: this shard's rows (input side) or all of it (output side), (F_B, r).
        error: ||W - W_eff||_F / ||W||_F over all shards, scalar tensor.
        error_before: The same with B = 0: what plain quantization of W would have given.
    """

    codes: Tensor
    scales: Tensor | None
    factor: Tensor
    error: Tensor
    error_before: Tensor


def row_chunks(rows: int, layout: MatrixLayout) -> Iterator[tuple[int, int]]:
    """Cuts `rows` into runs of whole groups of about `CHUNK_VALUES` values."""
    size = max(1, CHUNK_VALUES // layout.group_values) * layout.group_rows
    return ((start, min(start + size, rows)) for start in range(0, rows, size))


def plus_low_rank(
    weight_nI: Tensor, basis: Tensor, factor: Tensor, side: str, start: int, stop: int, *, scale: float
) -> Tensor:
    """Rows [start, stop) of this shard plus scale L(B): B_rows P^T (input; P whole) or P_rows B^T (output; B whole)."""
    left, right = (factor, basis) if side == "input" else (basis, factor)
    return torch.addmm(weight_nI, left[start:stop], right.T, alpha=scale)


def add_low_rank(
    weight_NI: Tensor, layout: MatrixLayout, basis: Tensor, factor: Tensor, side: str, scale: float
) -> None:
    """W += s L(B) on this shard's rows, in place."""
    for start, stop in row_chunks(weight_NI.shape[0], layout):
        rows = weight_NI[start:stop]
        rows.copy_(plus_low_rank(rows, basis, factor, side, start, stop, scale=scale))


def _quantize_round(
    weight_NI: Tensor,
    layout: MatrixLayout,
    basis: Tensor,
    pinv: Tensor,
    factor: Tensor | None,
    side: str,
    scale: float,
    new_factor: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """One round on this shard: (codes, scales, ||R||^2 of this shard); adds its part of the new B to `new_factor`."""
    rows = weight_NI.shape[0]
    packed: list[tuple[Tensor, Tensor | None]] = []
    squares = weight_NI.new_zeros(())
    for start, stop in row_chunks(rows, layout):
        weight = weight_NI[start:stop]
        target = weight if factor is None else plus_low_rank(weight, basis, factor, side, start, stop, scale=-scale)
        codes, scales = pack(target, layout)
        packed.append((codes, scales))
        dequantized = unpack(codes, scales, layout, torch.float32, rows=stop - start)
        residual = torch.sub(weight, dequantized, out=dequantized)
        squares += torch.linalg.vector_norm(residual).square()
        if side == "input":
            torch.mm(residual, pinv, out=new_factor[start:stop])
        else:
            new_factor.addmm_(residual.T, pinv[start:stop])
    if not packed:  # a shard without rows
        packed.append(pack(weight_NI, layout))
    codes = torch.cat([c for c, _ in packed])
    scales = torch.cat([s for _, s in packed if s is not None]) if packed[0][1] is not None else None
    new_factor.div_(scale)
    return codes, scales, squares


def compensate(
    weight_NI: Tensor,
    layout: MatrixLayout,
    basis: Tensor,
    gram_RR: Tensor,
    *,
    side: str,
    scale: float,
    rounds: int,
    sum_over_shards: SumOverShards = lambda tensor: tensor,
) -> Compensated:
    """Runs the alternating rounds on one shard. Every rank must call it, ranks without rows too.

    The arguments are those of `compensation`; `sum_over_shards` adds a tensor up over the shards, giving the same
    result on all.
    """
    rounds_of_one = compensation(weight_NI, layout, basis, gram_RR, side=side, scale=scale, rounds=rounds)
    return in_step([rounds_of_one], sum_over_shards)[0]


def in_step(generators: Sequence[Generator[Tensor, Tensor, Result]], sum_over_shards: SumOverShards) -> list[Result]:
    """Runs computations that all ask for sums of one shape: those of a turn are one sum. Every rank.

    Some may end before others, if they do so on all ranks: by what the sums have told them.
    """
    results: dict[int, Result] = {}
    asked = {index: next(generator) for index, generator in enumerate(generators)}
    while asked:
        alone = len(asked) == 1
        sums = [sum_over_shards(*asked.values())] if alone else sum_over_shards(torch.stack([*asked.values()]))
        totals, asked = dict(zip(asked, sums, strict=True)), {}
        for index, total in totals.items():
            try:
                asked[index] = generators[index].send(total)
            except StopIteration as end:
                results[index] = end.value
    return [results[index] for index in range(len(generators))]


def compensation(
    weight_NI: Tensor, layout: MatrixLayout, basis: Tensor, gram_RR: Tensor, *, side: str, scale: float, rounds: int
) -> Generator[Tensor, Tensor, Compensated]:
    """`compensate` of one matrix as a generator: it yields what shards have to add up, and is sent the sum.

    Args:
        weight_NI: This shard's rows of W, float32; left unchanged.
        layout: Layout of the whole W.
        basis: P as the layer will use it: whole (I, r) on side input, this shard's rows (N, r) on side output.
        gram_RR: P^T P of the whole P.
        side: `input` or `output`.
        scale: s.
        rounds: c, the most; 0 returns plain quantization with B = 0.
    """
    pinv = basis @ gram_inverse(gram_RR)  # P^+T: (I, r), or this shard's rows of it
    shape = (weight_NI.shape[0] if side == "input" else weight_NI.shape[1], basis.shape[1])
    # not square().sum(): that would be a second dense shard
    own_norm = torch.linalg.vector_norm(weight_NI).square()
    best: tuple[Tensor, Tensor | None, Tensor, Tensor] | None = None
    before = own_norm.new_zeros(())
    last, factor = weight_NI.new_zeros(shape), None  # B and B' of the round before
    gain = None  # of the round before
    for index in range(max(rounds, 1)):
        # B and two scalars lie side by side: what shards have to add up is one tensor
        buffer = weight_NI.new_zeros(shape[0] * shape[1] + 2)
        new_factor = buffer[:-2].view(shape)
        codes, scales, own_squares = _quantize_round(weight_NI, layout, basis, pinv, factor, side, scale, new_factor)
        if side == "input":
            taken = taken_squares(new_factor, gram_RR, scale)
            squares, norm, taken = yield torch.stack([own_squares, own_norm, taken])
        else:
            torch.stack([own_squares, own_norm], out=buffer[-2:])
            buffer = yield buffer
            new_factor = buffer[:-2].view(shape)
            (squares, norm), taken = buffer[-2:], taken_squares(new_factor, gram_RR, scale)
        norm = norm.clamp_min(1e-30)
        if index == 0:
            before = squares / norm
            best = (codes, scales, last, before)
        if rounds == 0 or layout.kind.exact:  # W is stored exactly: nothing to make up for
            break
        last, factor = new_factor, torch.lerp(last, new_factor, 1.0 + BEYOND)
        error = (squares - taken).clamp_min(0.0) / norm
        assert best is not None
        lowered, square = torch.stack([best[3] - error, best[3]]).tolist()
        if lowered > 0.0:
            best = (codes, scales, new_factor, error)
        gain, gain_before = error_gain(lowered, square), gain
        if expected_gain(gain, gain_before) < SETTLED:
            break
    assert best is not None
    return Compensated(codes=best[0], scales=best[1], factor=best[2], error=best[3].sqrt(), error_before=before.sqrt())


def error_gain(lowered: float, square: float) -> float:
    """By which share of itself an error falls, 1 - sqrt(1 - lowered / square), if its square falls by `lowered`."""
    return 1.0 - math.sqrt(max(0.0, 1.0 - lowered / max(square, 1e-30)))


def expected_gain(gain: float, before: float | None) -> float:
    """What the next round will gain, if gains go on to shrink as from the round `before` to this one."""
    return gain if before is None or before <= 0.0 else gain * max(0.0, min(1.0, gain / before))


def taken_squares(factor: Tensor, gram_RR: Tensor, scale: float) -> Tensor:
    """||s L(B)||^2 = s^2 tr(B^T B P^T P), of these rows of B."""
    return scale**2 * ((factor.T @ factor) * gram_RR).sum()


def gram_inverse(gram_RR: Tensor) -> Tensor:
    """(P^T P)^-1 in float64 inside, by Cholesky; the pseudo-inverse where a quantized P has lost a column."""
    lower, info = torch.linalg.cholesky_ex(gram_RR.double())
    if int(info) == 0:
        return torch.cholesky_inverse(lower).to(gram_RR.dtype)
    return torch.linalg.pinv(gram_RR.double(), hermitian=True).to(gram_RR.dtype)
