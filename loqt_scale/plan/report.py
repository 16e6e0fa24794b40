"""`loqt-scale plan`: what fits, in words and a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from loqt_scale.config import RunConfig
from loqt_scale.config.commands import OUTSIDE, PlanOptions
from loqt_scale.errors import ConfigError
from loqt_scale.functional.shares import micro_steps
from loqt_scale.metrics import format_span
from loqt_scale.model.build import design_model
from loqt_scale.optim import describe_rates
from loqt_scale.plan.activations import PassMemory
from loqt_scale.plan.advice import first_that_fits
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
    strategy = _strategy(config, ranks)
    shapes = model_shapes(design_model(config, vocab_size=vocab_size))
    one_pass = PassMemory(config, vocab_size=vocab_size)
    memory = rank_memory(config, shapes, one_pass, strategy=strategy, ranks=ranks)
    return Plan(memory, *_traffic(config, shapes, ranks))


def _traffic(config: RunConfig, shapes: ModelShapes, ranks: int) -> tuple[Traffic, Traffic]:
    passes = micro_steps(config.train.global_batch_size, ranks, config.train.micro_batch_size)
    step = step_traffic(config, shapes, strategy=_strategy(config, ranks), ranks=ranks, passes=passes)
    return step, merge_traffic(config, shapes, ranks=ranks, passes=passes)


def _strategy(config: RunConfig, ranks: int) -> str:
    name = config.parallel.strategy
    if name == "zero":
        raise ConfigError(
            "parallel.strategy is 'zero', whose buffers are DeepSpeed's affair; write --parallel.strategy fsdp, which "
            "holds what stage 3 shards"
        )
    if name == "auto":
        name = "fsdp" if ranks > 1 else "single"
        config.parallel.check_offload(name)
        return name
    if name == "single" and ranks > 1:
        raise ConfigError(f"parallel.strategy is 'single', but --gpus is {ranks}; write --gpus 1, or leave it out")
    return name


def report(config: RunConfig, options: PlanOptions, *, vocab_size: int, note: str = "") -> str:
    """The whole answer, for people."""
    ranks = options.gpus
    plan = plan_run(config, ranks=ranks, vocab_size=vocab_size)
    parts = [_title(config, ranks), _memory_table(plan.memory)]
    if options.gpu_memory is not None:
        parts.append(_verdict(config, plan, options, vocab_size))
    if ranks > 1:
        # which has no B to keep gathered, and would not send its gradients more than once a step
        parallel, adamw = replace(config.parallel, kept_between_passes="gradients"), replace(config.optim, name="adamw")
        full = replace(config, method="full", parallel=parallel, optim=adamw)
        dense, _ = _traffic(full, model_shapes(design_model(full, vocab_size=vocab_size)), ranks)
        parts.append(_wire_table(config, plan, dense))
    return "\n\n".join([*parts, note] if note else parts)


def _title(config: RunConfig, ranks: int) -> str:
    model, train, optim = config.model, config.train, config.optim
    method = "full-rank training"
    if config.method == "loqt":
        method = f"LoQT, rank {format_span(config.loqt.ranks)}, W in {config.loqt.quantization.weight}"
    kept = f"{model.trained_dtype} parameters, {optim.name}, {optim.states} states" + (
        ", updated per layer" if optim.per_layer else ""
    )
    batch = min(train.micro_batch_size, -(-train.global_batch_size // ranks))
    return (
        f"{model.path or model.preset}: {method}; {kept}\n"
        f"{ranks} rank(s), {_strategy(config, ranks)}, {batch} x {config.data.seq_len} tokens a pass in {model.dtype}"
        + (", activations recomputed" if model.activation_checkpointing else "")
        + f"\nrates {describe_rates(optim, train.steps)}"
    )


def _memory_table(memory: RankMemory) -> str:
    activations = memory.passing - (memory.gradients if memory.passing > memory.gradients else 0)
    rows = [(kind, size) for kind, size in memory.state.items() if size]
    rows += [("gradients", memory.gradients), ("activations, temporaries", activations)]
    rows += [("gathered, in buckets", memory.gathered), ("scratch of a merge", memory.merge_scratch)]
    rows += [("(in host memory)", memory.host)]
    rows += [("peak of a step", memory.step_peak), ("peak of a merge step", memory.merge_peak)]
    lines = [f"  {name:<26}{_size(size):>12}" for name, size in rows if size]
    return "\n".join([f"  {'bytes on a rank':<26}", *lines])


def _verdict(config: RunConfig, plan: Plan, options: PlanOptions, vocab_size: int) -> str:
    assert options.gpu_bytes is not None
    limit = options.gpu_bytes - OUTSIDE
    room = f"{options.gpu_memory} less {_size(OUTSIDE)} that torch does not count (assumed)"
    spare = limit - plan.memory.peak
    if spare >= 0:
        return f"fits: {_size(spare)} to spare of {room}"
    change = first_that_fits(
        config, ranks=options.gpus, fits=_checker(limit, ranks=options.gpus, vocab_size=vocab_size)
    )
    if change is not None:
        peak = plan_run(change.config, ranks=options.gpus, vocab_size=vocab_size).memory.peak
        advice = f"it fits ({_size(peak)}) with\n  " + " \\\n  ".join(change.words)
    else:
        advice = f"no setting that plan knows makes it fit on {options.gpus}; write --gpus {2 * options.gpus}"
    return f"does not fit: {_size(-spare)} too much for {room}\n{advice}"


def _checker(limit: int, *, ranks: int, vocab_size: int) -> Callable[[RunConfig], bool]:
    return lambda config: plan_run(config, ranks=ranks, vocab_size=vocab_size).memory.peak <= limit


def _wire_table(config: RunConfig, plan: Plan, dense: Traffic) -> str:
    lines = [f"  {'sent by a rank (ring)':<26}", f"  {'a step':<26}{_size(plan.step.sent):>12}"]
    lines.append(f"  {'a step, full-rank':<26}{_size(dense.sent):>12}   ratio {plan.step.sent / dense.sent:.3f}")
    if config.method == "loqt":
        lines.append(f"  {'a merge, beyond its step':<26}{_size(plan.merge.sent):>12}")
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
