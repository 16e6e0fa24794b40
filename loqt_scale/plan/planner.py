"""What a run will need on the rank that needs most: memory and traffic, from the settings alone."""

from __future__ import annotations

from dataclasses import dataclass

from loqt_scale.config import RunConfig
from loqt_scale.config.combinations import strategy_of
from loqt_scale.errors import ConfigError
from loqt_scale.functional.shares import micro_steps
from loqt_scale.model.build import design_model
from loqt_scale.plan.activations import PassMemory
from loqt_scale.plan.memory import RankMemory, rank_memory
from loqt_scale.plan.shapes import ModelShapes, model_shapes
from loqt_scale.plan.traffic import Traffic, merge_traffic, step_traffic


@dataclass(frozen=True)
class Plan:
    """What a run will need on the rank that needs most.

    Args:
        memory: Bytes.
        step: On the wire, each step.
        merge: On the wire, each merge.
    """

    memory: RankMemory
    step: Traffic
    merge: Traffic


def plan_run(config: RunConfig, *, ranks: int, vocab_size: int) -> Plan:
    """Computes a plan. Allocates nothing of the model.

    Args:
        config: The run. Its strategy `auto` is fsdp on several ranks.
        ranks: GPUs.
        vocab_size: The tokenizer's.

    Raises:
        ValueError: Settings that do not fit the model, or a strategy that is not planned.
    """
    strategy = planned_strategy(config, ranks)
    shapes = model_shapes(design_model(config, vocab_size=vocab_size))
    one_pass = PassMemory(config, vocab_size=vocab_size)
    memory = rank_memory(config, shapes, one_pass, strategy=strategy, ranks=ranks)
    return Plan(memory, *planned_traffic(config, shapes, ranks))


def planned_traffic(config: RunConfig, shapes: ModelShapes, ranks: int) -> tuple[Traffic, Traffic]:
    """Bytes on the wire of a step and of a merge."""
    passes = micro_steps(config.train.global_batch_size, ranks, config.train.micro_batch_size)
    step = step_traffic(config, shapes, strategy=planned_strategy(config, ranks), ranks=ranks, passes=passes)
    return step, merge_traffic(config, shapes, ranks=ranks, passes=passes)


def planned_strategy(config: RunConfig, ranks: int) -> str:
    """The strategy that a run of so many ranks takes; raises ConfigError if that is not planned."""
    name = strategy_of(config.parallel, ranks)
    if name == "zero":
        raise ConfigError(
            "parallel.strategy is 'zero', whose buffers are DeepSpeed's affair; write --parallel.strategy fsdp, which "
            "holds what stage 3 shards"
        )
    config.parallel.check_offload(name)
    if name == "single" and ranks > 1:
        raise ConfigError(f"parallel.strategy is 'single', but --gpus is {ranks}; write --gpus 1, or leave it out")
    return name
