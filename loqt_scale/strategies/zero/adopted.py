"""A DeepSpeed engine that somebody else made: found, checked, and its model's parameters given to merges."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from loqt_scale.errors import ConfigError, UserError
from loqt_scale.layers import LoQTLayer
from loqt_scale.optim import StreamedAdamW
from loqt_scale.strategies.editing import Editing, ReplicaEditing
from loqt_scale.strategies.placement import Replicated
from loqt_scale.strategies.process_group import GroupComm
from loqt_scale.strategies.zero.editing import ZeroEditing
from loqt_scale.strategies.zero.engine import RunningEngine
from loqt_scale.strategies.zero.placement import master_shards
from loqt_scale.strategies.zero.rules import ENGINE_RULES, check_rules, flattened


def is_engine(model: nn.Module) -> bool:
    """Whether this is what `deepspeed.initialize` returns. Local; DeepSpeed is not imported for it."""
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine)


def engine_of(model: nn.Module) -> nn.Module | None:
    """The DeepSpeed engine in whose hands a model is, if it is: the owner of its hooks on the model. Local.

    For programs that hand over what is inside of the engine only, as transformers' Trainer does.
    """
    if is_engine(model):
        return model
    hooks = [*model._forward_pre_hooks.values(), *model._forward_hooks.values()]
    cells = [cell.cell_contents for hook in hooks for cell in getattr(hook, "__closure__", None) or ()]
    owners = (owner for owner in cells if isinstance(owner, nn.Module) and is_engine(owner) and owner.module is model)
    return next(owners, None)


def is_held_by_engine(parameter: Tensor) -> bool:
    """Whether a DeepSpeed engine has taken a parameter over. Local."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def base_optimizer(engine: Any) -> Optimizer:
    """What updates the engine's flat tensors: the optimizer that its maker gave to it, or that it made itself. Local.

    Raises:
        UserError: There is none.
    """
    found = engine.optimizer
    while isinstance(getattr(found, "optimizer", None), Optimizer):
        found = found.optimizer
    if not isinstance(found, Optimizer):
        raise UserError(
            f"the DeepSpeed engine's optimizer is {type(found).__name__}, which updates nothing; give "
            "deepspeed.initialize(optimizer=...) one over the parameters that require a gradient"
        )
    return found


def adopt_engine(engine: Any) -> tuple[str, Editing]:
    """What the engine is, and its parameters and moments for merges. Every rank.

    Args:
        engine: DeepSpeed's.

    Raises:
        UserError: It is of a kind that merges do not know.
    """
    stage = _checked_stage(engine)
    comm = GroupComm(engine.device, group=dist.group.WORLD)
    description = f"DeepSpeed engine, ZeRO stage {stage}, {comm.world_size} rank(s)"
    if stage == 0:
        return description, ReplicaEditing(comm, Replicated(engine.device))
    running = RunningEngine(sys.modules["deepspeed"], stage, engine)
    if stage == 3:  # a layer reads its parts itself: gathered with it, not by each's access, which alters the trace
        running.deepspeed.utils.set_z3_leaf_modules(engine.module, [LoQTLayer], raise_if_not_found=False)
    optimizer = base_optimizer(engine)
    if isinstance(optimizer, StreamedAdamW):
        optimizer.place(lambda tensor: tensor, lambda _: 0, master_shards(comm))
    running.tell_fragments(optimizer, comm.rank)
    return description, ZeroEditing(comm, running)


def _checked_stage(engine: Any) -> int:
    deepspeed, stage = sys.modules["deepspeed"], int(engine.zero_optimization_stage())
    if isinstance(engine, deepspeed.PipelineEngine):
        raise UserError("the model is in a DeepSpeed PipelineEngine, which merges do not know; use ZeRO stages 1 to 3")
    try:
        check_rules(flattened(engine._config._param_dict), ENGINE_RULES)
    except ConfigError as error:
        raise UserError(f"the DeepSpeed engine's configuration: {error}") from None
    zero = {1: "bit16_groups", 2: "bit16_groups", 3: "fp16_groups"}
    known = hasattr(engine.optimizer, zero[stage]) if stage else isinstance(engine.optimizer, Optimizer)
    if not known or type(engine.optimizer).__name__ == "BF16_Optimizer":
        raise UserError(
            f"the DeepSpeed engine is of stage {stage}, and its optimizer a {type(engine.optimizer).__name__}, which "
            'merges do not know; write "zero_optimization": {"stage": 2} (or 3)'
        )
    return stage
