"""Bytes on the wire of a step and of a merge, from shapes; counted as `WireCounter` counts what is really sent.

A payload is the whole tensor of a collective. In a ring of N ranks each rank sends (N-1)/N of it, twice that for an
all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loqt_scale.config import LoQTConfig, RunConfig
from loqt_scale.functional.low_rank_linear import LowRankSpec
from loqt_scale.functional.projection import VALIDATION_COLUMNS
from loqt_scale.functional.shares import shard_range
from loqt_scale.merge import NUMBERS, deal, probe_shape
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

    Under HSDP of the replica that sends most: each merges its layers, and hands them on to the others.
    """
    if spread.ranks == 1:
        return Traffic(0, 0)
    size = spread.work_size
    sketches = sum(FLOAT * math.prod(probe_shape(spec, loqt.subspace)) for spec in shapes.layers)
    turned = [_turned_bytes(loqt, spec, size) for spec in shapes.layers]
    found, once, reduced = max(_merged_in_replicas(loqt, shapes, turned, spread), key=sum)
    more, summed = _beyond_rows(shapes, spread)
    kinds = ("codes of W", "scales of W", "P", "B")
    across = sum(p.nbytes(size) for p in shapes.parameters if p.kind in kinds) + sum(turned) // size
    heads = sum(FLOAT * (NUMBERS + spec.expert_count) for spec in shapes.layers)
    return _Rings(
        inside=found + once + more,
        summed_inside=reduced + summed + FLOAT * 2 * len(shapes.layers),  # survival
        across=across + heads,
        everywhere=passes * sketches,
        summed_everywhere=4 * FLOAT,  # whether there is something to merge
    ).traffic(spread)


def _turned_bytes(loqt: LoQTConfig, spec: LowRankSpec, ranks: int) -> int:
    """What carries the moments of B over, r x r of each matrix, in the largest shares of its rows."""
    rows = spec.expert_count * spec.projection.cols
    whole = shard_range(rows, 0, ranks)[1] * ranks * spec.projection.cols
    return FLOAT * whole if loqt.merge.optimizer_state == "transport" else 0


def _merged_in_replicas(
    loqt: LoQTConfig, shapes: ModelShapes, turned: Sequence[int], spread: Spread
) -> Iterator[tuple[int, int, int]]:
    """(the new P, gathered, all-reduced) payloads of each replica: of the layers it merges, and has from others."""
    owners = deal(range(len(shapes.layers)), spread.ranks)
    for replica in range(spread.replicas):
        mine = [index for index, owner in owners.items() if owner // (spread.ranks // spread.replicas) == replica]
        own = [_layer_merge(loqt, shapes.layers[index], spread.work_size) for index in mine]
        others = sum(turned) - sum(turned[index] for index in mine)
        found, once, reduced = (sum(column) for column in zip(*own, strict=True)) if own else (0, 0, 0)
        yield found, once + others, reduced


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


def _layer_merge(loqt: LoQTConfig, spec: LowRankSpec, ranks: int) -> tuple[int, int, int]:
    """(the new P, gathered, all-reduced) payloads of one layer whose rows so many ranks share out."""
    base, layout, rounds = spec.base, spec.projection, loqt.merge.compensation_rounds
    packed = (layout.groups + ranks) * (layout.codes_shape[1] + (layout.scales_shape or (0, 0))[1])
    rank, experts, each = layout.cols, spec.expert_count, spec.each
    factor_rows = experts * (each.base.rows + each.base.cols - each.projection.rows)
    factor = FLOAT * (factor_rows + ranks * base.group_rows) * rank
    energies = FLOAT * experts * (1 + rank * VALIDATION_COLUMNS)
    found, reduced = packed + energies, FLOAT * 3 * rounds * experts  # three numbers a round
    if spec.side == "output":
        return found, packed + factor, reduced + rounds * factor
    aligned = base.rows % ranks == 0 and base.group_rows == 1
    return found, packed + (0 if aligned else 2 * factor), reduced
