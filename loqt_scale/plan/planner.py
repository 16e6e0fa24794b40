"""What a run will need on the rank that needs most: memory and traffic, from the settings alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loqt_scale.config import RunConfig
from loqt_scale.functional.shares import micro_steps
from loqt_scale.model.build import design_model
from loqt_scale.model.flops import pass_flops
from loqt_scale.plan.activations import OnePass
from loqt_scale.plan.devices import Machine
from loqt_scale.plan.memory import RankMemory, rank_memory
from loqt_scale.plan.shapes import ModelShapes, model_shapes
from loqt_scale.plan.speed import Speed, planned_speed
from loqt_scale.plan.spread import Spread, planned_spread
from loqt_scale.plan.traffic import Traffic, merge_traffic, step_traffic


@dataclass(frozen=True)
class Plan:
    """What a run will need on the rank that needs most.

    Args:
        spread: How it is spread over ranks.
        memory: Bytes.
        step: On the wire, each step.
        merge: On the wire, each merge.
        speed: On the machine that was named, if one was.
    """

    spread: Spread
    memory: RankMemory
    step: Traffic
    merge: Traffic
    speed: Speed | None = None


def plan_run(config: RunConfig, *, ranks: int, vocab_size: int, on: Machine | None = None) -> Plan:
    """Computes a plan. Allocates nothing of the model.

    Args:
        config: The run. Its strategy `auto` is fsdp on several ranks.
        ranks: GPUs.
        vocab_size: The tokenizer's.
        on: The GPUs, if the speed is wanted.

    Raises:
        ValueError: Settings that do not fit the model, or a strategy that is not planned.
    """
    spread = planned_spread(config.parallel, config.train.global_batch_size, ranks)
    share = -(-config.train.global_batch_size // spread.data_size)  # a pass holds no more than a rank has
    size = min(config.train.micro_batch_size, share)
    config = replace(config, train=replace(config.train, micro_batch_size=size))
    design = design_model(config, vocab_size=vocab_size)
    shapes = model_shapes(design)
    one_pass = OnePass(config, vocab_size=vocab_size)
    memory = rank_memory(config, shapes, one_pass, spread)
    traffic = planned_traffic(config, shapes, spread)
    speed = None
    if on is not None:
        recomputes = config.model.activation_checkpointing
        flops = pass_flops(design.model, sequences=size, seq_len=config.data.seq_len, recomputes=recomputes)
        speed = planned_speed(config, shapes, one_pass, flops, spread, traffic, on)
    return Plan(spread, memory, *traffic, speed)


def planned_traffic(config: RunConfig, shapes: ModelShapes, spread: Spread) -> tuple[Traffic, Traffic]:
    """Bytes on the wire of a step and of a merge."""
    passes = micro_steps(config.train.global_batch_size, spread.data_size, config.train.micro_batch_size)
    step = step_traffic(config, shapes, spread, passes=passes)
    return step, merge_traffic(config.loqt, shapes, spread, passes=passes)
