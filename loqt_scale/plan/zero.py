"""What DeepSpeed's ZeRO holds and sends, by stage; seen on real ranks (`tests/distributed/test_plan.py`).

    stage   a step sends                                        a rank holds, of N
    1       gradients once, then what trains                    1/N of masters and moments
    2       gradients in every pass, then what trains           1/N of the gradients between passes, too
    3       everything once or twice a pass, gradients too      1/N of everything

Gradients travel in float32, parameters in the compute dtype, packed ones as bytes.
"""

from __future__ import annotations

from loqt_scale.config import RunConfig
from loqt_scale.errors import ConfigError
from loqt_scale.plan.shapes import STATE_KINDS, ModelShapes, ParameterShape
from loqt_scale.plan.updates import FLOAT, moment_bytes
from loqt_scale.strategies import DTYPES
from loqt_scale.strategies.zero.config import LARGEST_BUCKET

MASTERS = "float32 masters"
LIVE_VALUES, REUSED_VALUES = 10**9, 10**9  # DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance
SCALARS = 4 * FLOAT + 12  # norms and overflow; the loss with its two companions


def zero_stage(config: RunConfig) -> int:
    """The stage; raises ConfigError for what is not planned."""
    parallel = config.parallel
    for name in ("zero_config", "zero_offload"):
        value = getattr(parallel, name)
        if value not in (None, "none"):
            raise ConfigError(
                f"parallel.{name} is '{value}', which plan does not know; leave it out, and write --parallel.zero_stage"
            )
    return parallel.zero_stage or 3


def zero_state(config: RunConfig, shapes: ModelShapes, ranks: int) -> dict[str, int]:
    """Bytes that a rank holds between steps, by kind."""
    cut = ranks if zero_stage(config) == 3 else 1
    state = {kind: sum(_share(p, cut, config) for p in shapes.parameters if p.kind == kind) for kind in STATE_KINDS}
    trained = [p for p in shapes.parameters if p.trains]
    state[MASTERS] = FLOAT * -(-sum(p.values() for p in trained) // ranks)
    state["moments"] = sum(moment_bytes(p, config.optim, 1) for p in trained) // ranks
    return state


def zero_gradients(config: RunConfig, shapes: ModelShapes, ranks: int, passes: int) -> tuple[int, int]:
    """(bytes of gradients between passes and before the update, of the bucket in which they are reduced)."""
    values = sum(p.values() for p in shapes.parameters if p.trains)
    whole = zero_stage(config) == 1 and passes > 1
    return FLOAT * (values if whole else -(-values // ranks)), FLOAT * min(LARGEST_BUCKET, values)


def zero_gathered(config: RunConfig, shapes: ModelShapes) -> int:
    """Bytes of whole parameters at a time under stage 3: as many values as DeepSpeed lets live."""
    if zero_stage(config) < 3:
        return 0
    whole = sum(_share(p, 1, config) for p in shapes.parameters)
    values = sum(p.values() for p in shapes.parameters)
    return whole * min(values, LIVE_VALUES) // values


def zero_step(config: RunConfig, shapes: ModelShapes, passes: int) -> tuple[int, int, int]:
    """Payloads of a step's gathers, reduce-scatters and all-reduces."""
    trained = sum(p.values() for p in shapes.parameters if p.trains)
    compute = DTYPES[config.model.dtype].itemsize
    stage = zero_stage(config)
    if stage < 3:
        return trained * compute, 0, FLOAT * trained * (1 if stage == 1 else passes) + SCALARS
    whole = sum(_share(p, 1, config) for p in shapes.parameters)
    values = sum(p.values() for p in shapes.parameters)
    # what is needed again within so many values, there and back, stays from the forward to the backward pass
    kept = min(1.0, REUSED_VALUES / 2 / values)
    return round(passes * whole * (2.0 - kept)), passes * FLOAT * trained, SCALARS


def _share(parameter: ParameterShape, ranks: int, config: RunConfig) -> int:
    size = DTYPES[config.model.dtype].itemsize if parameter.dtype.is_floating_point else parameter.dtype.itemsize
    return -(-parameter.values() // ranks) * size
