"""A plan in words and tables."""

from __future__ import annotations

from collections.abc import Callable

from loqt_scale.config import DataConfig, RunConfig, TrainConfig
from loqt_scale.config.sizes import OUTSIDE, parse_size
from loqt_scale.config.sources import run_shares
from loqt_scale.metrics import format_count, format_span
from loqt_scale.model.build import design_model
from loqt_scale.optim import describe_rates
from loqt_scale.plan.advice import first_that_fits
from loqt_scale.plan.devices import Machine
from loqt_scale.plan.memory import RankMemory
from loqt_scale.plan.planner import Plan, plan_run, planned_traffic
from loqt_scale.plan.shapes import model_shapes
from loqt_scale.plan.speed_table import describe_speed, full_rank
from loqt_scale.plan.spread import Spread, planned_spread
from loqt_scale.plan.traffic import Traffic


def describe_plan(
    config: RunConfig,
    *,
    ranks: int,
    vocab_size: int,
    gpu_memory: str | None = None,
    note: str = "",
    on: Machine | None = None,
    tokens: int | None = None,
) -> str:
    """The whole answer, for people.

    Args:
        config: The run.
        ranks: GPUs.
        vocab_size: The tokenizer's.
        gpu_memory: What each GPU has, such as 24GB; None: that is not asked.
        note: A last line.
        on: The GPUs, if the speed is wanted.
        tokens: Of the whole run, for its days. Default: the run's steps.
    """
    plan = plan_run(config, ranks=ranks, vocab_size=vocab_size, on=on)
    parts = [_title(config, plan.spread), _memory_table(plan.memory)]
    if gpu_memory is not None:
        parts.append(_verdict(config, plan, gpu_memory, ranks=ranks, vocab_size=vocab_size))
    if on is not None:
        parts.append(describe_speed(config, plan, on, ranks=ranks, vocab_size=vocab_size, tokens=tokens))
    if ranks > 1:
        full = full_rank(config, ranks)
        spread = planned_spread(full.parallel, full.train.global_batch_size, ranks)
        dense, _ = planned_traffic(full, model_shapes(design_model(full, vocab_size=vocab_size)), spread)
        parts.append(_wire_table(plan, dense, merges=config.method == "loqt"))
    return "\n\n".join([*parts, note] if note else parts)


def _title(config: RunConfig, spread: Spread) -> str:
    model, train, optim = config.model, config.train, config.optim
    method = "full-rank training"
    if config.method == "loqt":
        method = f"LoQT, rank {format_span(config.loqt.ranks)}, W in {config.loqt.quantization.weight}"
    kept = f"{model.trained_dtype} parameters, {optim.name}, {optim.states} states" + (
        ", updated per layer" if optim.per_layer else ""
    )
    batch = min(train.micro_batch_size, -(-train.global_batch_size // spread.ranks))
    return (
        f"{model.path or model.preset}: {method}; {kept}\n"
        f"{spread.ranks} rank(s), {_strategy(spread)}, "
        f"{batch} x {config.data.seq_len} tokens a pass in {model.dtype}"
        + (", activations recomputed" if model.activation_checkpointing else "")
        + f"\nrates {describe_rates(optim, train.steps)}"
        + _texts(config.data, train)
    )


def _strategy(spread: Spread) -> str:
    return spread.strategy + (f" in {spread.replicas} replicas of {spread.shard_size}" if spread.replicas > 1 else "")


def _texts(data: DataConfig, train: TrainConfig) -> str:
    """A line on what a run reads of each source."""
    tokens = train.steps * train.global_batch_size * data.seq_len
    parts = (
        f"{name} {share:.1%} ({format_count(round(share * tokens))} tokens)"
        for name, share in run_shares(data.mixture, train.steps).items()
    )
    return f"\ntext  {', '.join(parts)}" if data.mixture else ""


def _memory_table(memory: RankMemory) -> str:
    activations = memory.passing - (memory.gradients if memory.passing > memory.gradients else 0)
    rows = [(kind, size) for kind, size in memory.state.items() if size]
    rows += [("gradients", memory.gradients), ("activations, temporaries", activations)]
    rows += [("gathered, in buckets", memory.gathered), ("scratch of a merge", memory.merge_scratch)]
    rows += [("(in host memory)", memory.host)]
    rows += [("peak of a step", memory.step_peak), ("peak of a merge step", memory.merge_peak)]
    lines = [f"  {name:<26}{_size(size):>12}" for name, size in rows if size]
    return "\n".join([f"  {'bytes on a rank':<26}", *lines])


def _verdict(config: RunConfig, plan: Plan, gpu_memory: str, *, ranks: int, vocab_size: int) -> str:
    limit = parse_size(gpu_memory) - OUTSIDE
    room = f"{gpu_memory} less {_size(OUTSIDE)} that torch does not count (assumed)"
    spare = limit - plan.memory.peak
    if spare >= 0:
        return f"fits: {_size(spare)} to spare of {room}"
    change = first_that_fits(config, ranks=ranks, fits=_checker(limit, ranks=ranks, vocab_size=vocab_size))
    if change is not None:
        peak = plan_run(change.config, ranks=ranks, vocab_size=vocab_size).memory.peak
        advice = f"it fits ({_size(peak)}) with\n  " + " \\\n  ".join(change.words)
    else:
        advice = f"no setting that plan knows makes it fit on {ranks}; write --gpus {2 * ranks}"
    return f"does not fit: {_size(-spare)} too much for {room}\n{advice}"


def _checker(limit: int, *, ranks: int, vocab_size: int) -> Callable[[RunConfig], bool]:
    return lambda config: plan_run(config, ranks=ranks, vocab_size=vocab_size).memory.peak <= limit


def _wire_table(plan: Plan, dense: Traffic, *, merges: bool) -> str:
    lines = [f"  {'sent by a rank (ring)':<26}", f"  {'a step':<26}{_size(plan.step.sent):>12}"]
    lines += _between_replicas(plan.step)
    lines.append(f"  {'a step, full-rank FSDP2':<26}{_size(dense.sent):>12}   ratio {plan.step.sent / dense.sent:.3f}")
    lines += _between_replicas(dense)
    if merges:
        lines.append(f"  {'a merge, beyond its step':<26}{_size(plan.merge.sent):>12}")
        lines += _between_replicas(plan.merge)
    return "\n".join(lines)


def _between_replicas(traffic: Traffic) -> list[str]:
    """HSDP: what leaves the ranks that store a model once."""
    return [f"  {'  between replicas':<26}{_size(traffic.sent - traffic.inside):>12}"] if traffic.inside else []


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
