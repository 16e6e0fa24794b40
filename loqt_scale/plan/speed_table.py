"""A planned speed in words and a table, beside full-rank training under FSDP2 on the same machine."""

from __future__ import annotations

from dataclasses import asdict, replace

from loqt_scale.config import RunConfig
from loqt_scale.config.sizes import OUTSIDE
from loqt_scale.plan.devices import Machine
from loqt_scale.plan.planner import Plan, plan_run

DAY = 24 * 3600
GUESSED = ("attention", "network", "unhidden", "launch_us", "factorise")
"""What `devices.yaml` says of machines that nobody has measured as it is now."""


def describe_speed(
    config: RunConfig, plan: Plan, on: Machine, *, ranks: int, vocab_size: int, tokens: int | None
) -> str:
    """The table, and what it assumes.

    Args:
        config: The run.
        plan: Its plan, with a speed.
        on: The machine.
        ranks: GPUs.
        vocab_size: The tokenizer's.
        tokens: Of the whole run. Default: its steps'.
    """
    plans = {"LoQT" if config.method == "loqt" else "full rank": plan}
    if config.method == "loqt":
        plans["full rank"] = plan_run(full_rank(config, ranks), ranks=ranks, vocab_size=vocab_size, on=on)
    total = tokens or config.train.steps * config.train.global_batch_size * config.data.seq_len
    columns = [_column(each, on, total) for each in plans.values()]
    lines = [f"  {'planned, not measured':<26}" + "".join(f"{name:>18}" for name in plans)]
    for label in columns[0]:
        lines.append(f"  {label:<26}" + "".join(f"{column[label]:>18}" for column in columns))
    return "\n".join([*lines, "", _assumed(on, ranks, config.model.dtype)])


def full_rank(config: RunConfig, ranks: int) -> RunConfig:
    """The same batch and passes in full-rank training with AdamW, under FSDP2 on several ranks."""
    parallel = replace(
        config.parallel,
        strategy="fsdp" if ranks > 1 else "single",
        kept_between_passes="gradients",  # it has no B to keep, and would not send its gradients more than once a step
        offload="none",
        zero_stage=None,
        zero_config=None,
        zero_offload=None,
    )
    optim = replace(config.optim, name="adamw", states="float32", per_layer=False, compile=False)
    model = replace(config.model, trained_dtype="float32")
    return replace(config, method="full", parallel=parallel, optim=optim, model=model)


def _column(plan: Plan, on: Machine, total: int) -> dict[str, str]:
    speed = plan.speed
    assert speed is not None
    fits = plan.memory.peak + OUTSIDE <= on.gpu.memory * 1e9
    return {
        "a step, s": f"{speed.step:.3f}",
        "  compute, s": f"{speed.compute:.3f}",
        "  memory bandwidth, s": f"{speed.memory:.3f}",
        "  network, s": f"{speed.network:.3f}",
        "  host, s": f"{speed.host:.3f}",
        "bound by": speed.bound,
        "a merge, s": f"{speed.merge:.2f}" if speed.merges else "-",
        "merges, of the time": f"{speed.merges * speed.merge / speed.seconds:.1%}" if speed.merges else "-",
        "tokens/s": f"{speed.tokens_per_second:,.0f}",
        "tokens/s a GPU": f"{speed.tokens_per_second / speed.ranks:,.0f}",
        "executed TFLOP/s a GPU": f"{speed.flops / speed.seconds / 1e12:.0f}",
        "MFU": f"{speed.mfu:.1%}",
        f"days to {_count(total)} tokens": f"{total / speed.tokens_per_second / DAY:.2f}",
        "peak, GiB": f"{plan.memory.peak / 2**30:.1f}{'' if fits else ' (too much)'}",
    }


def _assumed(on: Machine, ranks: int, dtype: str) -> str:
    gpu, peak = on.gpu, on.gpu.peak(dtype) / 1e12
    machine = f"{ranks} x {on.name}: {peak:g} TFLOP/s in {dtype}, {gpu.bandwidth:g} GB/s, {gpu.memory:g} GB"
    if ranks > 1:
        machine += f", {on.link} of {on.link_rate:g} GB/s a GPU"
    if ranks > on.assumed.node_gpus:
        machine += f" (inside of a node {gpu.inside} of {on.inside_rate:g})"
    fractions = ", ".join(f"{name} {value:g}" for name, value in asdict(on.assumed).items())
    guesses = f"{', '.join(GUESSED[:-1])} and {GUESSED[-1]} (of a merge) are guesses where the table is ours"
    return (
        f"  assumed: {machine}\n  {fractions}\n  {guesses}\n"
        "  (loqt_scale/devices.yaml explains; another table: --devices FILE)"
    )


def _count(tokens: int) -> str:
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6)):
        if tokens >= size:
            return f"{tokens / size:.3g} {unit}"
    return str(tokens)
