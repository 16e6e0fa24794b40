"""DeepSpeed's configuration: our settings, plus an optional DeepSpeed JSON (`parallel.zero_config`).

What the JSON leaves out, or writes as "auto", is filled from our settings. What both sides name must be the same, or is
refused with both values. The rest is passed on as it stands, unless it would break the frozen bytes or the loop
(`keys` lists what would, with the reasons). All of this happens before a process group exists or anything is
allocated: settings in, dict out, without torch or DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from loqt_scale.config import ParallelConfig, RunConfig
from loqt_scale.errors import ConfigError
from loqt_scale.strategies.zero.json import AUTO, Tree, lookup, naming, read_zero_json, shown
from loqt_scale.strategies.zero.keys import DTYPES, SCHEDULERS

LARGEST_BUCKET = 20_000_000  # values, of which DeepSpeed allocates a buffer; its default of 5e8 is 2 GB in float32
PREFETCH_BUCKET = 50_000_000

_STAGE = "zero_optimization.stage"
_OFFLOAD_OPTIMIZER = "zero_optimization.offload_optimizer.device"
_OFFLOAD_PARAM = "zero_optimization.offload_param.device"


@dataclass(frozen=True)
class _Ours:
    """A value that both sides may name.

    Args:
        key: The JSON's key.
        value: What our settings amount to, in the JSON's terms; a list of one value per group may be one number there.
        setting: Ours in words, as "optim.clip_norm is 1.0".
        remedy: What to write on our side instead, with the JSON's value as {}; empty if no single setting will do.
    """

    key: str
    value: Any
    setting: str
    remedy: str = ""


def resolve_zero_stage(config: RunConfig) -> int:
    """The ZeRO stage of a run: `parallel.zero_stage`, else the JSON's, else 3.

    Raises:
        ConfigError: The JSON cannot be used.
    """
    return _stage(config, read_zero_json(config.parallel.zero_config))


def names_scheduler(config: RunConfig) -> bool:
    """Whether a run's DeepSpeed JSON has a scheduler, which then moves the learning rates instead of `optim.schedule`.

    Raises:
        ConfigError: The JSON cannot be used.
    """
    return config.parallel.strategy == "zero" and "scheduler" in read_zero_json(config.parallel.zero_config)


def check_zero_config(config: RunConfig, *, world_size: int) -> None:
    """Checks what a run says about ZeRO; reads a file, changes nothing.

    Args:
        config: The run. With another strategy than zero, settings of zero may not be given.
        world_size: Ranks of the run.

    Raises:
        ConfigError: The JSON cannot be used, or contradicts our settings.
    """
    if config.parallel.strategy == "zero":
        _checked(config, world_size)
    else:
        _check_unused(config.parallel)


def deepspeed_config(config: RunConfig, *, world_size: int, trained_values: int) -> Tree:
    """The configuration that `deepspeed.initialize` gets; nothing in it is left as "auto".

    Args:
        config: The run.
        world_size: Ranks of the run.
        trained_values: Number of values that train: no bucket need be larger.

    Returns:
        A fresh nested dict. It has no `optimizer`: the trainer passes its AdamW. If it has a `scheduler`, DeepSpeed
        sets the learning rates, else the trainer does.

    Raises:
        ConfigError: As `check_zero_config`.
    """
    tree = _checked(config, world_size)
    tree.pop("optimizer", None)
    return _merge(_merge(_defaults(config, tree, trained_values), tree), _batch_sizes(config, world_size))


# ---- contradictions --------------------------------------------------------------------------------------------------


def _checked(config: RunConfig, world_size: int) -> Tree:
    """The JSON, free of contradictions."""
    path = config.parallel.zero_config
    tree = read_zero_json(path)
    with naming(path):
        for ours in _shared_values(config, tree, world_size):
            _check_same(tree, ours)
        _check_offload(config, tree)
        _check_dtypes(config, tree)
        _check_one_schedule(config, tree)
    return tree


def _check_unused(parallel: ParallelConfig) -> None:
    """Under another strategy, somebody would count on a sharding that does not take place."""
    offload = None if parallel.zero_offload == "none" else parallel.zero_offload  # which is true of every strategy
    given = {"zero_config": parallel.zero_config, "zero_stage": parallel.zero_stage, "zero_offload": offload}
    for name, value in given.items():
        if value is not None:
            raise ConfigError(
                f"parallel.{name} is {value!r}, but parallel.strategy is '{parallel.strategy}'; "
                f"write parallel.strategy: zero, or leave parallel.{name} out"
            )


def _check_same(tree: Tree, ours: _Ours) -> None:
    value = lookup(tree, ours.key)
    if value is None:
        return
    per_group = isinstance(ours.value, list) and not isinstance(value, list)
    if ([value] * len(ours.value) if per_group else value) != ours.value:
        remedy = f", or {ours.remedy.format(shown(value))}" if ours.remedy else ""
        raise ConfigError(f'{ours.key} is {shown(value)}, but {ours.setting}; write "{AUTO}" in the file{remedy}')


def _shared_values(config: RunConfig, tree: Tree, world_size: int) -> Iterator[_Ours]:
    train, optim, parallel = config.train, config.optim, config.parallel
    yield _same("train_batch_size", "train.global_batch_size", train.global_batch_size)
    yield _same("train_micro_batch_size_per_gpu", "train.micro_batch_size", train.micro_batch_size)
    yield _accumulation_steps(config, world_size)
    yield _same("gradient_clipping", "optim.clip_norm", optim.clip_norm)
    yield _same("log_level", "parallel.zero_log_level", parallel.zero_log_level)
    yield _bf16(config)
    for name in ("lr", "eps", "weight_decay"):
        yield _same(f"optimizer.params.{name}", f"optim.{name}", getattr(optim, name))
    yield _same("optimizer.params.betas", "optim.betas", list(optim.betas))
    if optim.states == "int8":
        setting = "optim.states is 'int8', whose optimizer is not one of those that DeepSpeed knows"
        yield _Ours("zero_allow_untested_optimizer", True, setting, "optim.states: float32")
    if optim.name == "muon":
        if lookup(tree, "optimizer.type") is not None:
            raise ConfigError(
                f"optimizer.type is {shown(lookup(tree, 'optimizer.type'))}, but optim.name is 'muon', which is this "
                "package's own; leave the file's optimizer block out, or write optim.name: adamw"
            )
        setting = "optim.name is 'muon', which is this package's own"
        yield _Ours("zero_allow_untested_optimizer", True, setting, "optim.name: adamw")
    if parallel.zero_stage is not None:
        yield _same(_STAGE, "parallel.zero_stage", parallel.zero_stage)
    if parallel.zero_offload is not None:
        yield from _offload_devices(parallel.zero_offload)
    yield from _scheduler_values(config, tree)


def _same(key: str, setting: str, value: Any) -> _Ours:
    """One value of the JSON that is one setting of ours."""
    return _Ours(key, value, f"{setting} is {shown(value)}", f"{setting}: {{}}")


def _accumulation_steps(config: RunConfig, world_size: int) -> _Ours:
    train, steps = config.train, _micro_steps(config, world_size)
    setting = (
        f"train.global_batch_size {train.global_batch_size} on {world_size} rank(s) in micro-batches of "
        f"{train.micro_batch_size} (train.micro_batch_size) makes {steps}"
    )
    return _Ours("gradient_accumulation_steps", steps, setting)


def _bf16(config: RunConfig) -> _Ours:
    dtype = config.model.dtype
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    return _Ours("bf16.enabled", dtype == "bfloat16", f"model.dtype is '{dtype}'", f"model.dtype: {other}")


def _offload_devices(offload: str) -> Iterator[_Ours]:
    for key, offloaded in ((_OFFLOAD_OPTIMIZER, offload != "none"), (_OFFLOAD_PARAM, offload == "parameters")):
        setting = f"parallel.zero_offload is '{offload}'"
        yield _Ours(key, "cpu" if offloaded else "none", setting, "leave parallel.zero_offload out")


def _scheduler_values(config: RunConfig, tree: Tree) -> list[_Ours]:
    """Those parameters of the JSON's scheduler, if it has one, that are settings of ours."""
    train, optim = config.train, config.optim
    rates = [optim.lr, optim.lr if optim.full_precision_lr is None else optim.full_precision_lr]  # low_rank first
    warmup = max(1, optim.warmup_of(train.steps))  # DeepSpeed wants 1 at least
    asked = f"optim.warmup_steps is {optim.warmup_steps or 0}"
    if optim.warmup_fraction is not None:
        asked = f"optim.warmup_fraction is {optim.warmup_fraction} of {train.steps} steps"
    known = {
        "total_num_steps": _same("", "train.steps", train.steps),
        "warmup_num_steps": _Ours("", warmup, asked, "optim.warmup_steps: {}"),
        "warmup_max_lr": _Ours("", rates, f"optim.lr and optim.full_precision_lr are {shown(rates)}"),
        "cos_min_ratio": _same("", "optim.final_lr_fraction", optim.final_lr_fraction),
    }
    taken = SCHEDULERS.get(lookup(tree, "scheduler.type"), frozenset())
    return [replace(ours, key=f"scheduler.params.{name}") for name, ours in known.items() if name in taken]


def _check_offload(config: RunConfig, tree: Tree) -> None:
    """Parameters can be offloaded only where they are sharded."""
    stage = _stage(config, tree)
    if stage == 3 or not _offloaded(config, tree)[1]:
        return
    why = f"but stage {stage} keeps every parameter whole on every rank"
    if config.parallel.zero_offload == "parameters":
        raise ConfigError(
            f"parallel.zero_offload is 'parameters', {why}; write parallel.zero_offload: optimizer, or stage 3"
        )
    raise ConfigError(f'{_OFFLOAD_PARAM} is "cpu", {why}; write "none", or stage 3')


def _check_dtypes(config: RunConfig, tree: Tree) -> None:
    dtype = config.model.dtype
    stored, summed = lookup(tree, "data_types.param_dtype"), lookup(tree, "data_types.grad_accum_dtype")
    if stored is not None and DTYPES[stored] != dtype:
        raise ConfigError(
            f"data_types.param_dtype is \"{stored}\", but model.dtype is '{dtype}'; "
            f'write "{AUTO}" in the file, or model.dtype: {DTYPES[stored]}'
        )
    if summed is not None and DTYPES[summed] == "float32" and _sums_in_16_bits(config, tree):
        raise ConfigError(
            f"data_types.grad_accum_dtype is \"{summed}\", but model.dtype is '{dtype}' and the stage is 1: DeepSpeed "
            f'would take another optimizer, which merges do not know; write "{AUTO}" in the file, or stage 2'
        )


def _check_one_schedule(config: RunConfig, tree: Tree) -> None:
    """A scheduler in the file takes the place of `optim.schedule`, unless that asks for another than the default."""
    asked = config.optim.schedule
    if "scheduler" in tree and asked != "cosine":
        raise ConfigError(
            f"scheduler.type is {shown(lookup(tree, 'scheduler.type'))}, but optim.schedule is '{asked}'; leave one of "
            "the two out"
        )


# ---- values ----------------------------------------------------------------------------------------------------------


def _stage(config: RunConfig, tree: Tree) -> int:
    return config.parallel.zero_stage or lookup(tree, _STAGE) or 3


def _offloaded(config: RunConfig, tree: Tree) -> tuple[bool, bool]:
    """Whether optimizer states, and whether parameters, are kept in host memory."""
    offload = config.parallel.zero_offload
    if offload is not None:
        return offload != "none", offload == "parameters"
    return lookup(tree, _OFFLOAD_OPTIMIZER) == "cpu", lookup(tree, _OFFLOAD_PARAM) == "cpu"


def _sums_in_16_bits(config: RunConfig, tree: Tree) -> bool:
    """Whether gradients of micro-batches are added up in bfloat16.

    At stage 1, and unless the states are offloaded, float32 sums would make DeepSpeed choose its BF16_Optimizer.
    """
    return _stage(config, tree) == 1 and config.model.dtype == "bfloat16" and not _offloaded(config, tree)[0]


def _micro_steps(config: RunConfig, world_size: int) -> int:
    """As `data.batching.micro_steps`, which stands above the strategies: they cannot import it."""
    largest_share = -(-config.train.global_batch_size // world_size)
    return -(-largest_share // config.train.micro_batch_size)


def _batch_sizes(config: RunConfig, world_size: int) -> Tree:
    """What DeepSpeed's consistency check wants; where ranks have unequal shares, its batch is larger than ours."""
    micro_batch, steps = config.train.micro_batch_size, _micro_steps(config, world_size)
    return {
        "train_batch_size": micro_batch * steps * world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": steps,
    }


def _defaults(config: RunConfig, tree: Tree, trained_values: int) -> Tree:
    """All that is ours to say where the JSON does not."""
    values: Tree = {
        "gradient_clipping": config.optim.clip_norm,
        "log_level": config.parallel.zero_log_level,
        "bf16": {"enabled": config.model.dtype == "bfloat16", "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero_defaults(config, tree, trained_values),
    }
    if not _sums_in_16_bits(config, tree):
        values["data_types"] = {"grad_accum_dtype": "fp32"}
    if "scheduler" in tree:
        values["scheduler"] = {"params": _scheduler_defaults(config, tree)}
    return values


def _zero_defaults(config: RunConfig, tree: Tree, trained_values: int) -> Tree:
    stage, (optimizer, parameters) = _stage(config, tree), _offloaded(config, tree)
    bucket = max(1, min(LARGEST_BUCKET, trained_values))
    values: Tree = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket + bucket % 2,  # DeepSpeed wants an even number
        "round_robin_gradients": False,
        "memory_efficient_linear": False,  # else zero.Init replaces torch.nn.functional.linear, for good
    }
    if stage == 3:
        values["stage3_prefetch_bucket_size"] = PREFETCH_BUCKET
        values["stage3_param_persistence_threshold"] = 0  # small parameters are sharded too
    if optimizer:
        values["offload_optimizer"] = {"device": "cpu"}
    if parameters:
        values["offload_param"] = {"device": "cpu"}
    return values


def _scheduler_defaults(config: RunConfig, tree: Tree) -> Tree:
    values = {ours.key.rpartition(".")[2]: ours.value for ours in _scheduler_values(config, tree)}
    rates = values.get("warmup_max_lr", [])
    if len(set(rates)) == 1:
        values["warmup_max_lr"] = rates[0]
    if lookup(tree, "scheduler.type") == "OneCycle":
        values["cycle_momentum"] = False  # it would replace both of optim.betas
    return values


def _merge(base: Tree, over: Tree) -> Tree:
    """`base` with the values of `over`, block by block."""
    merged = dict(base)
    for key, value in over.items():
        below = base.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
