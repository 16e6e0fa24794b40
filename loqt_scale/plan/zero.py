"""What DeepSpeed's ZeRO holds and sends, by stage; seen on real ranks (`tests/distributed/test_plan.py`).

    stage   a step sends                                        a rank holds, of N
    1       gradients once, then what trains                    1/N of masters and moments
    2       gradients in every pass, then what trains           1/N of the gradients between passes, too
    3       everything once or twice a pass, gradients too      1/N of everything

Gradients travel in float32, parameters in the compute dtype, packed ones as bytes.
"""

from __future__ import annotations

from loqt_scale.config import Dtype, OptimConfig
from loqt_scale.plan.shapes import STATE_KINDS, ModelShapes, ParameterShape
from loqt_scale.plan.spread import Spread
from loqt_scale.plan.updates import FLOAT, moment_bytes
from loqt_scale.strategies import DTYPES
from loqt_scale.strategies.zero.config import LARGEST_BUCKET

MASTERS = "float32 masters"
LIVE_VALUES, REUSED_VALUES = 10**9, 10**9  # DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance
SCALARS = 4 * FLOAT + 12  # norms and overflow; the loss with its two companions


def zero_state(shapes: ModelShapes, spread: Spread, dtype: Dtype, optim: OptimConfig) -> dict[str, int]:
    """Bytes that a rank holds between steps, by kind."""
    cut = spread.shard_size
    state = {kind: sum(_share(p, cut, dtype) for p in shapes.parameters if p.kind == kind) for kind in STATE_KINDS}
    trained = [p for p in shapes.parameters if p.trains]
    state[MASTERS] = FLOAT * -(-sum(p.values() for p in trained) // spread.ranks)
    state["moments"] = sum(moment_bytes(p, optim, 1) for p in trained) // spread.ranks
    return state


def zero_gradients(shapes: ModelShapes, spread: Spread, passes: int) -> tuple[int, int]:
    """(bytes of gradients between passes and before the update, of the bucket in which they are reduced)."""
    values = sum(p.values() for p in shapes.parameters if p.trains)
    whole = spread.zero_stage == 1 and passes > 1
    return FLOAT * (values if whole else -(-values // spread.ranks)), FLOAT * min(LARGEST_BUCKET, values)


def zero_gathered(shapes: ModelShapes, spread: Spread, dtype: Dtype) -> int:
    """Bytes of whole parameters at a time under stage 3: as many values as DeepSpeed lets live."""
    if spread.zero_stage < 3:
        return 0
    whole = sum(_share(p, 1, dtype) for p in shapes.parameters)
    values = sum(p.values() for p in shapes.parameters)
    return whole * min(values, LIVE_VALUES) // values


def zero_step(shapes: ModelShapes, spread: Spread, dtype: Dtype, passes: int) -> tuple[int, int, int]:
    """Payloads of a step's gathers, reduce-scatters and all-reduces."""
    trained = sum(p.values() for p in shapes.parameters if p.trains)
    compute, stage = DTYPES[dtype].itemsize, spread.zero_stage
    if stage < 3:
        return trained * compute, 0, FLOAT * trained * (1 if stage == 1 else passes) + SCALARS
    whole = sum(_share(p, 1, dtype) for p in shapes.parameters)
    values = sum(p.values() for p in shapes.parameters)
    # what is needed again within so many values, there and back, stays from the forward to the backward pass
    kept = min(1.0, REUSED_VALUES / 2 / values)
    return round(passes * whole * (2.0 - kept)), passes * FLOAT * trained, SCALARS


def _share(parameter: ParameterShape, ranks: int, dtype: Dtype) -> int:
    size = DTYPES[dtype].itemsize if parameter.dtype.is_floating_point else parameter.dtype.itemsize
    return -(-parameter.values() // ranks) * size
