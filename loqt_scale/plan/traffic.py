"""Bytes on the wire of a step and of a merge, from shapes; counted as `WireCounter` counts what is really sent.

A payload is the whole tensor of a collective. In a ring of N ranks each rank sends (N-1)/N of it, twice that for an
all-reduce.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from loqt_scale.config import LoQTConfig, RunConfig
from loqt_scale.functional.low_rank_linear import LowRankSpec
from loqt_scale.merge import probe_shape
from loqt_scale.plan.memory import summed_bytes
from loqt_scale.plan.shapes import ModelShapes
from loqt_scale.plan.spread import Spread
from loqt_scale.plan.updates import FLOAT, muon_bytes
from loqt_scale.plan.zero import zero_step
from loqt_scale.strategies import DTYPES


@dataclass(frozen=True)
class Traffic:
    """Bytes of one step or merge: payload, what one rank sends in rings, and how much of that to ranks of its replica.

    Without replicas of a sharded model (HSDP) all rings go through all ranks, and `inside` is 0.
    """

    payload: int
    sent: int
    inside: int = 0


@dataclass(frozen=True)
class _Rings:
    """Payloads by who takes part: the ranks of one replica, those that hold one shard, or all."""

    inside: int = 0
    summed_inside: int = 0
    across: int = 0
    summed_across: int = 0
    everywhere: int = 0
    summed_everywhere: int = 0

    def traffic(self, spread: Spread) -> Traffic:
        """An all-reduce is sent twice around its ring."""
        size, copies, ranks = spread.work_size, spread.replicas, spread.ranks
        inside = (self.inside + 2 * self.summed_inside) * (size - 1) // size
        across = (self.across + 2 * self.summed_across) * (copies - 1) // copies
        everywhere = (self.everywhere + 2 * self.summed_everywhere) * (ranks - 1) // ranks
        payload = self.inside + self.summed_inside + self.everywhere + self.summed_everywhere
        payload += self.across + self.summed_across if copies > 1 else 0
        return Traffic(payload, inside + across + everywhere, inside if copies > 1 else 0)


def step_traffic(config: RunConfig, shapes: ModelShapes, spread: Spread, *, passes: int) -> Traffic:
    """A normal step.

    Args:
        config: The run.
        shapes: Its model.
        spread: How it is spread over ranks.
        passes: Forward and backward passes of a step.
    """
    if spread.ranks == 1:
        return Traffic(0, 0)
    trained = [p for p in shapes.parameters if p.trains]
    if spread.strategy == "ddp":
        reduced = sum(summed_bytes(p, passes) for p in trained)
        # and the loss with its two companions, the gradient's norm
        return _Rings(summed_everywhere=reduced + 4 * FLOAT).traffic(spread)
    if spread.strategy == "zero":
        gathers, scatters, sums = zero_step(shapes, spread, config.model.dtype, passes)
        return _Rings(everywhere=gathers + scatters, summed_everywhere=sums).traffic(spread)
    size, parallel = spread.shard_size, config.parallel
    compute, gathered = DTYPES[config.model.dtype], 0
    for p in shapes.parameters:
        once = parallel.kept_between_passes == "trained" and (p.of_layer or p.unit < 0)
        times = 1 if once else passes * (2 if parallel.reshard_after_forward and p.unit >= 0 else 1)
        gathered += times * p.gathered_bytes(size, compute)
    shards = sum(p.values(size) * FLOAT for p in trained)
    shards *= passes if parallel.kept_between_passes == "nothing" else 1
    return _Rings(
        inside=gathered + shards * size,
        summed_inside=muon_bytes(config.optim, shapes),
        summed_across=shards,
        summed_everywhere=FLOAT * (3 + 1),  # the loss with its two companions; the gradient's norm
    ).traffic(spread)


def merge_traffic(loqt: LoQTConfig, shapes: ModelShapes, spread: Spread, *, passes: int) -> Traffic:
    """A merge with the sketches of its step's passes: under fsdp an upper bound that is met up to padding.

    Under HSDP each replica merges its own copy, and takes the first one's sums and rows.
    """
    size = spread.work_size
    if spread.ranks == 1:
        return Traffic(0, 0)
    layers = [_layer_merge(loqt, spec, size, passes) for spec in shapes.layers]
    found, once, reduced = (sum(column) for column in zip(*layers, strict=True)) if layers else (0, 0, 0)
    more, summed = _beyond_rows(shapes, spread)
    once, reduced = once + more, reduced + summed
    written = sum(p.nbytes(size) for p in shapes.parameters if p.kind in ("codes of W", "scales of W", "B"))
    return _Rings(
        inside=once,
        summed_inside=reduced,
        across=written + reduced,
        everywhere=found,
        summed_everywhere=4 * FLOAT,  # whether there is something to merge
    ).traffic(spread)


def _beyond_rows(shapes: ModelShapes, spread: Spread) -> tuple[int, int]:
    """(once, all-reduced) of a strategy that does not store the rows which a rank merges.

    Replicas gather the new W; ZeRO sums B and its moments, of which ranks hold parts. Its stage 3 gathers the moments,
    and the old W and the new one where the ranks do not divide its row groups: they hold no whole rows then.
    """
    if spread.strategy == "fsdp":
        return 0, 0
    weights = [p for p in shapes.parameters if p.kind in ("codes of W", "scales of W")]
    factors = sum(p.nbytes() for p in shapes.parameters if p.kind == "B")
    if spread.shard_size > 1:
        cut = sum(p.nbytes() for p in weights if p.shape[0] % spread.ranks)
        return 2 * cut + 2 * factors, 0
    return sum(p.nbytes() for p in weights), 3 * factors if spread.strategy == "zero" else 0


def _layer_merge(loqt: LoQTConfig, spec: LowRankSpec, ranks: int, passes: int) -> tuple[int, int, int]:
    """(found and told to all ranks, gathered, all-reduced) payloads of one layer whose rows so many ranks share out."""
    base, layout, rounds = spec.base, spec.projection, loqt.merge.compensation_rounds
    packed = (layout.groups + ranks) * (layout.codes_shape[1] + (layout.scales_shape or (0, 0))[1])
    rank, experts, each = layout.cols, spec.expert_count, spec.each
    factor_rows = experts * (each.base.rows + each.base.cols - each.projection.rows)
    factor = FLOAT * (factor_rows + ranks * base.group_rows) * rank
    # a sketch of each pass, the new P, energies
    found = passes * FLOAT * math.prod(probe_shape(spec, loqt.subspace)) + packed + FLOAT * experts
    reduced = FLOAT * (2 + 3 * rounds * experts)  # survival, three numbers a round
    if spec.side == "output":
        return found, packed + factor, reduced + rounds * factor
    aligned = base.rows % ranks == 0 and base.group_rows == 1
    return found, packed + (0 if aligned else 2 * factor), reduced
