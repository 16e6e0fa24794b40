"""Bytes on a rank: what it holds between steps, and the highest moments of a step and of a merge.

Legend: N ranks. What is sharded (fsdp) or replicated (single, ddp) follows `strategies`; the number of bytes of a
parameter follows its layout (`functional.quantization`), of its moments the optimizer (`optim`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loqt_scale.config import Dtype, ParallelConfig, RunConfig, SubspaceConfig
from loqt_scale.functional.compensation import CHUNK_VALUES
from loqt_scale.functional.nf4_cpu import CHUNK_VALUES as TABLE_VALUES
from loqt_scale.functional.shares import micro_steps
from loqt_scale.merge import AIR_BYTES, probe_shape, wave_size
from loqt_scale.plan.activations import OnePass
from loqt_scale.plan.shapes import EMBEDDING, HEAD, ROOT, STATE_KINDS, ModelShapes, ParameterShape, by_unit
from loqt_scale.plan.spread import Spread
from loqt_scale.plan.updates import FLOAT, device_type, moment_bytes, update_scratch
from loqt_scale.plan.zero import zero_gathered, zero_gradients, zero_state
from loqt_scale.strategies import DTYPES, is_offloaded

CHUNK_BUFFERS = 2  # float32, of a merge's chunk of rows: what is quantized, and what comes back
QUANTIZER_BYTES = 14  # a value, of the table look-up's own chunk
BUCKET_VALUES = 25 * 2**20 // 2  # bfloat16 gradients of a bucket of DDP's, unless one parameter has more


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the rank that has most.

    Args:
        state: Parameters by kind, and `moments`: there all the time.
        gradients: Of what trains, as the update finds them; 0 where they never pile up.
        passing: Forward and backward beyond the state: activations, gradients while they are made, temporaries.
        gathered: Blocks of other ranks' parameters while they are used (fsdp), and buckets (ddp).
        merge_passing: As `passing`, in a step that a merge follows.
        merge_scratch: What the merge itself adds to the state, after the backward pass.
        host: What waits in host memory (`parallel.offload`): parameters, their moments and gradients.
    """

    state: dict[str, int]
    gradients: int
    passing: int
    gathered: int
    merge_passing: int
    merge_scratch: int
    host: int = 0

    @property
    def held(self) -> int:
        """Between steps."""
        return sum(self.state.values())

    @property
    def step_peak(self) -> int:
        """Highest moment of a normal step."""
        return self.held + self.gathered + self.passing

    @property
    def merge_peak(self) -> int:
        """Highest moment of a step that a merge follows, merge included; 0 without merges."""
        if not self.merge_scratch:
            return 0
        return self.held + max(self.gathered + self.merge_passing, self.merge_scratch)

    @property
    def peak(self) -> int:
        """Highest moment of all."""
        return max(self.step_peak, self.merge_peak)


def rank_memory(config: RunConfig, shapes: ModelShapes, passes: OnePass, spread: Spread) -> RankMemory:
    """Adds everything up.

    Args:
        config: The run.
        shapes: Its model.
        passes: What forward and backward add.
        spread: How it is spread over ranks.
    """
    if spread.strategy == "zero":
        return _zero_memory(config, shapes, passes, spread)
    strategy, cut, offload = spread.strategy, spread.shard_size, config.parallel.offload
    dtype, device = config.model.dtype, device_type(config.train)
    away, here = ([p for p in shapes.parameters if is_offloaded(p.trains, offload) is where] for where in (True, False))
    state = {kind: sum(p.nbytes(cut) for p in here if p.kind == kind) for kind in STATE_KINDS}
    state["moments"] = sum(moment_bytes(p, config.optim, cut) for p in here if p.trains)
    gradients = 0 if config.optim.per_layer else sum(p.nbytes(cut) for p in here if p.trains)
    passes_of_step = micro_steps(config.train.global_batch_size, spread.data_size, config.train.micro_batch_size)
    one_pass = passes_of_step == 1
    # from the second pass on, the sums of those before it are there all the time, unless they wait in host memory
    waiting = sum(summed_bytes(p, passes_of_step, cut) for p in here if p.trains) if gradients else 0
    host = sum(p.nbytes() for p in away)
    host += sum(moment_bytes(p, config.optim, 1) + summed_bytes(p, passes_of_step) for p in away if p.trains)
    merges = config.method == "loqt"
    if strategy == "single":
        gathered = gathered_bytes(away, cut, dtype, config.parallel)
        piles_up = one_pass and any(p.trains for p in here)
        passing = passes.gradients_pile_up if piles_up else passes.gradients_freed + waiting
        merge_passing = passes.merge_freed + waiting if merges else 0
    else:
        # ddp: gradients lie in its buckets in the last pass, and beside them in those before it
        gathered = gradients
        if strategy != "ddp":
            gathered = gathered_bytes(shapes.parameters, cut, dtype, config.parallel)
        beside = 0 if strategy == "ddp" and one_pass else waiting
        if strategy == "fsdp" and not one_pass and config.parallel.kept_between_passes != "nothing":
            beside = sum(p.values() * FLOAT for p in here if p.trains)  # whole, until the last pass sums them
        joined = joined_bytes(shapes) if strategy == "ddp" and waiting > gradients else 0
        passing = max(passes.gradients_freed, joined) + beside
        merge_passing = max(passes.merge_freed, joined) + beside if merges else 0
    updating = update_scratch(config, shapes, cut)
    if config.optim.per_layer:
        passing = passes.gradients_freed + updating
        merge_passing += updating if merges else 0
    elif config.optim.name == "muon":  # whole matrices, when activations are gone
        passing, merge_passing = (max(p, gradients + updating) if p else 0 for p in (passing, merge_passing))
    if merges:
        merge_passing += collected_bytes(config.loqt.subspace, shapes, spread.ranks, passes_of_step, device)
    scratch = merge_scratch(shapes, spread.work_size) if shapes.layers else 0
    return RankMemory(state, gradients, passing, gathered, merge_passing, scratch, host)


def _zero_memory(config: RunConfig, shapes: ModelShapes, passes: OnePass, spread: Spread) -> RankMemory:
    """Under DeepSpeed, which keeps its bucket and the reduced gradients beside what a pass takes."""
    count = micro_steps(config.train.global_batch_size, spread.data_size, config.train.micro_batch_size)
    gradients, bucket = zero_gradients(shapes, spread, count)
    merges, beside = config.method == "loqt", gradients + bucket
    device = device_type(config.train)
    collected = collected_bytes(config.loqt.subspace, shapes, spread.ranks, count, device) if merges else 0
    return RankMemory(
        zero_state(shapes, spread, config.model.dtype, config.optim),
        gradients,
        passes.gradients_freed + beside,
        zero_gathered(shapes, spread, config.model.dtype),
        passes.merge_freed + beside + collected if merges else 0,
        merge_scratch(shapes, spread.ranks) + bucket if shapes.layers else 0,
    )


def summed_bytes(parameter: ParameterShape, passes: int, ranks: int = 1) -> int:
    """A gradient's, of the largest share: what several passes add up is float32 whatever the parameter is."""
    return parameter.nbytes(ranks) if passes == 1 else parameter.values(ranks) * FLOAT


def joined_bytes(shapes: ModelShapes) -> int:
    """ddp: the largest bucket's float32 sums on their way over the wire, when activations are gone."""
    values = [p.values() for p in shapes.parameters if p.trains]
    return FLOAT * max(min(sum(values), BUCKET_VALUES), max(values, default=0))


def gathered_bytes(parameters: Sequence[ParameterShape], ranks: int, dtype: Dtype, parallel: ParallelConfig) -> int:
    """What FSDP2 fetches: the root's; the block in use and the next one, the embedding, or the head and the last block;
    and gradients on their way."""
    compute = DTYPES[dtype] if ranks > 1 else None

    def gathered(unit: Iterable[ParameterShape]) -> int:
        return sum(p.gathered_bytes(ranks, compute) for p in unit)

    apart = parallel.kept_between_passes == "trained" and ranks > 1  # B stays from the first pass to the last
    kept = [p for p in parameters if apart and p.of_layer]
    units = by_unit(p for p in parameters if not (apart and p.of_layer))
    blocks = [gathered(unit) for index, unit in units.items() if index >= 0]
    root, embedding, head = (gathered(units.get(index, [])) for index in (ROOT, EMBEDDING, HEAD))
    largest = max(blocks, default=0)
    stays = largest if parallel.reshard_after_forward or ranks == 1 else sum(blocks)
    resident = embedding + head + stays + largest if apart else max(embedding, stays + max(largest, head))
    reduced = [sum(p.values(ranks) * ranks * FLOAT for p in unit if p.trains) for unit in units.values()]
    return root + resident + gathered(kept) + max(reduced, default=0)


def merge_scratch(shapes: ModelShapes, ranks: int) -> int:
    """The largest layer's dense float32 shard, packed and low-rank copies, chunks."""
    most = 0
    for spec in shapes.layers:
        rows = spec.base.rows_of_groups(0, -(-spec.base.groups // ranks))[1]
        shard = rows * spec.base.cols * FLOAT
        packed_bytes = spec.base.codes_shape[1] + (spec.base.scales_shape or (0, 0))[1]
        packed = -(-spec.base.groups // ranks) * packed_bytes
        rank = spec.projection.cols
        low_rank = spec.expert_count * (spec.each.base.rows + spec.each.base.cols) * rank * FLOAT
        chunk = FLOAT * CHUNK_BUFFERS * min(rows * spec.base.cols, CHUNK_VALUES)
        chunk += QUANTIZER_BYTES * min(rows * spec.base.cols, TABLE_VALUES)
        most = max(most, shard + 3 * packed + 4 * low_rank + chunk)
    return most


def collected_bytes(subspace: SubspaceConfig, shapes: ModelShapes, ranks: int, passes: int, device: str) -> int:
    """What was collected for a merge and is there when the last backward pass begins, whose activations are the peak.

    Of one pass nothing: its sketches come, a few at a time (`merge.collection`), while activations go. Of several, the
    sums of all layers that a rank owns, and what is in the air.
    """
    if passes == 1:
        return 0
    sizes = [FLOAT * math.prod(probe_shape(spec, subspace)) for spec in shapes.layers]
    wave = wave_size(shapes.layers, subspace, world_size=ranks, device_type=device)
    largest = max(sizes, default=0)
    air = min(sum(sizes), 2 * wave * largest, AIR_BYTES + largest) if ranks > 1 else 0
    return -(-sum(sizes) // ranks) + air
