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
    """Bytes of one step or merge: payload, and what one rank sends in a ring."""

    payload: int
    sent: int


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
        reduced += 4 * FLOAT  # the loss with its two companions, the gradient's norm
        return Traffic(reduced, 2 * reduced * (spread.data_size - 1) // spread.data_size)
    if spread.strategy == "zero":
        gathers, scatters, sums = zero_step(config, shapes, passes)
        around = (gathers + scatters + 2 * sums) * (spread.ranks - 1) // spread.ranks
        return Traffic(gathers + scatters + sums, around)
    ranks, parallel = spread.shard_size, config.parallel
    compute, gathered = DTYPES[config.model.dtype], 0
    for p in shapes.parameters:
        once = parallel.kept_between_passes == "trained" and (p.of_layer or p.unit < 0)
        times = 1 if once else passes * (2 if parallel.reshard_after_forward and p.unit >= 0 else 1)
        gathered += times * p.gathered_bytes(ranks, compute)
    scattered = sum(p.values(ranks) * ranks * FLOAT for p in trained)
    scattered *= passes if parallel.kept_between_passes == "nothing" else 1
    summed = FLOAT * (3 + 1) + muon_bytes(config.optim, shapes)  # the loss with its two companions; the gradient's norm
    payload = gathered + scattered + summed
    return Traffic(payload, (gathered + scattered + 2 * summed) * (ranks - 1) // ranks)


def merge_traffic(config: RunConfig, shapes: ModelShapes, spread: Spread, *, passes: int) -> Traffic:
    """A merge with the sketches of its step's passes: under fsdp an upper bound that is met up to padding."""
    loqt, ranks = config.loqt, spread.ranks
    if ranks == 1:
        return Traffic(0, 0)
    layers = [_layer_merge(loqt, spec, ranks, passes) for spec in shapes.layers]
    once, reduced = (sum(column) for column in zip(*layers, strict=True)) if layers else (0, 0)
    reduced += 4 * FLOAT  # whether there is something to merge
    more, summed = _beyond_rows(shapes, spread)
    once, reduced = once + more, reduced + summed
    return Traffic(once + reduced, (once + 2 * reduced) * (ranks - 1) // ranks)


def _beyond_rows(shapes: ModelShapes, spread: Spread) -> tuple[int, int]:
    """(once, all-reduced) of a strategy that does not store the rows which a rank merges.

    Replicas gather the new W; ZeRO sums B and its moments, of which ranks hold parts; its stage 3 gathers what is
    packed for the merge and hands it on, and B, too.
    """
    weights, frozen, factors = (
        sum(p.nbytes() for p in shapes.parameters if p.kind in kinds)
        for kinds in (("codes of W", "scales of W"), ("codes of W", "scales of W", "P"), ("B",))
    )
    if spread.strategy == "fsdp":
        return 0, 0
    if spread.shard_size > 1:
        return 3 * frozen + 4 * factors, 0
    return weights, 3 * factors if spread.strategy == "zero" else 0


def _layer_merge(loqt: LoQTConfig, spec: LowRankSpec, ranks: int, passes: int) -> tuple[int, int]:
    """(payload of gathers, broadcasts and reduces, payload of all-reduces) of one layer."""
    base, layout, rounds = spec.base, spec.projection, loqt.merge.compensation_rounds
    packed = (layout.groups + ranks) * (layout.codes_shape[1] + (layout.scales_shape or (0, 0))[1])
    rank, experts, each = layout.cols, spec.expert_count, spec.each
    factor_rows = experts * (each.base.rows + each.base.cols - each.projection.rows)
    factor = FLOAT * (factor_rows + ranks * base.group_rows) * rank
    sketches = passes * FLOAT * math.prod(probe_shape(spec, loqt.subspace))
    # energies; survival, three numbers a round
    once, reduced = sketches + 2 * packed + FLOAT * experts, FLOAT * (2 + 3 * rounds * experts)
    if spec.side == "output":
        return once + factor, reduced + rounds * factor
    aligned = base.rows % ranks == 0 and base.group_rows == 1
    return once + (0 if aligned else 2 * factor), reduced
