"""DeepSpeed's configuration: our settings, plus an optional DeepSpeed JSON (`parallel.zero_config`).

What the JSON leaves out, or writes as "auto", is filled from our settings. What both sides name must be the same, or is
refused with both values. What would break a run unnoticed is refused with the reason (`keys`). The rest is passed
on as it stands, and checked by DeepSpeed itself (`check`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from loqt_scale.config import ParallelConfig, RunConfig
from loqt_scale.errors import ConfigError
from loqt_scale.functional.shares import micro_steps
from loqt_scale.strategies.zero.check import check_by_deepspeed
from loqt_scale.strategies.zero.json import naming, nested, read_zero_json, shown
from loqt_scale.strategies.zero.keys import DTYPES, RULES, Rule, check_rules

LARGEST_BUCKET = 20_000_000  # values, of which DeepSpeed allocates a buffer; its default of 5e8 is 2 GB in float32
PREFETCH_BUCKET = 50_000_000

File = Mapping[str, Any]  # dotted keys and values
_ZERO = "zero_optimization."
_AUTO = 'write "auto" in the file'
_CHECKED_ONLY = ("optimizer", "train_batch_size", "sequence_parallel_size")  # DeepSpeed works the batch out


def names_scheduler(parallel: ParallelConfig) -> bool:
    """Whether a run's DeepSpeed JSON has a scheduler, which then moves the learning rates instead of `optim.schedule`.

    Raises:
        ConfigError: The JSON cannot be read.
    """
    return parallel.strategy == "zero" and _has_scheduler(read_zero_json(parallel.zero_config))


def check_zero_unused(parallel: ParallelConfig) -> None:
    """Refuses settings of ZeRO under another strategy: somebody would count on a sharding that does not take place.

    Raises:
        ConfigError: The setting, its value and the strategy.
    """
    offload = None if parallel.zero_offload == "none" else parallel.zero_offload  # which is true of every strategy
    given = {"zero_config": parallel.zero_config, "zero_stage": parallel.zero_stage, "zero_offload": offload}
    for name, value in given.items():
        if value is not None:
            raise ConfigError(
                f"parallel.{name} is {value!r}, but parallel.strategy is '{parallel.strategy}'; "
                f"write parallel.strategy: zero, or leave parallel.{name} out"
            )


def deepspeed_config(config: RunConfig, file: File, *, world_size: int) -> dict[str, Any]:
    """The configuration that `deepspeed.initialize` gets, checked; nothing in it is left as "auto".

    DeepSpeed (which must have been imported: `engine.import_deepspeed`) reads the result.

    Args:
        config: The run, whose strategy is zero.
        file: Its JSON (`read_checked`).
        world_size: Ranks of the run.

    Returns:
        A fresh nested dict. It has no `optimizer`: the trainer passes its AdamW. If it has a `scheduler`, DeepSpeed
        sets the learning rates, else the trainer does. Sizes of buckets wait for the model (`size_buckets`).

    Raises:
        ConfigError: The JSON contradicts our settings or would break them, or DeepSpeed refuses it.
    """
    with naming(config.parallel.zero_config):
        filled = tuple(_filled_rules(config, file, world_size))
        check_rules(file, (*filled, *_compared_rules(config, file)))
        file = {key: value for key, value in file.items() if key.partition(".")[0] not in _CHECKED_ONLY}
        ours = {rule.key: rule.allowed[0] for rule in filled if rule.allowed != ("none",)} | _constants(config, file)
        settings = nested({**ours, **file})
        check_by_deepspeed(settings)
        return settings


def read_checked(config: RunConfig) -> dict[str, Any]:
    """The JSON as dotted keys, without what can be refused before DeepSpeed is imported.

    Raises:
        ConfigError: It cannot be read, contradicts our settings or would break them.
    """
    file = read_zero_json(config.parallel.zero_config)
    with naming(config.parallel.zero_config):
        batch = _setting("train_batch_size", "train.global_batch_size", config.train.global_batch_size)
        check_rules(file, (*RULES, batch))
        _check_optimizer(file)
    return file


def size_buckets(settings: dict[str, Any], trained_values: int) -> None:
    """Fills in the sizes of buckets that the JSON does not give: none need be larger than all the values that train."""
    bucket = max(1, min(LARGEST_BUCKET, trained_values))
    settings["zero_optimization"].setdefault("reduce_bucket_size", bucket)
    even = bucket + bucket % 2  # DeepSpeed wants an even number
    settings["zero_optimization"].setdefault("allgather_bucket_size", even)


# ---- what both sides name --------------------------------------------------------------------------------------------


def _setting(key: str, setting: str, value: Any) -> Rule:
    """The rule that one value of the JSON is one setting of ours."""
    return Rule(key, (value,), f"{setting} is {shown(value)}", f"{_AUTO}, or {setting}: {{}}")


def _filled_rules(config: RunConfig, file: File, world_size: int) -> Iterator[Rule]:
    """Values that are compared with ours, and filled in where there are none."""
    train, dtype, parallel = config.train, config.model.dtype, config.parallel
    yield _setting("train_micro_batch_size_per_gpu", "train.micro_batch_size", train.micro_batch_size)
    steps = micro_steps(train.global_batch_size, world_size, train.micro_batch_size)
    why = (
        f"train.global_batch_size {train.global_batch_size} on {world_size} rank(s) in micro-batches of "
        f"{train.micro_batch_size} (train.micro_batch_size) makes {steps}"
    )
    yield Rule("gradient_accumulation_steps", (steps,), why, _AUTO)
    yield _setting("gradient_clipping", "optim.clip_norm", config.optim.clip_norm)
    yield _setting("log_level", "parallel.zero_log_level", parallel.zero_log_level)
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    yield Rule("bf16.enabled", (dtype == "bfloat16",), f"model.dtype is '{dtype}'", f"{_AUTO}, or model.dtype: {other}")
    yield _setting(f"{_ZERO}stage", "parallel.zero_stage", _stage(config, file))
    remedy = f"{_AUTO}, or leave parallel.zero_offload out"
    for name, offloaded in zip(("offload_optimizer", "offload_param"), _offloaded(config, file), strict=True):
        allowed = "cpu" if offloaded else "none"
        yield Rule(f"{_ZERO}{name}.device", (allowed,), f"parallel.zero_offload is '{parallel.zero_offload}'", remedy)
    if _has_scheduler(file):
        yield from _scheduler_rules(config, file)


def _scheduler_rules(config: RunConfig, file: File) -> Iterator[Rule]:
    """Those parameters of the JSON's scheduler that are settings of ours."""
    from deepspeed.runtime import lr_schedules

    steps, optim, block = config.train.steps, config.optim, "scheduler.params."
    name: Any = file.get("scheduler.type")
    names = lr_schedules.VALID_LR_SCHEDULES
    if name not in names:
        said = "scheduler has no type" if name is None else f"scheduler.type is {shown(name)}"
        raise ConfigError(f"{said}; write one of {', '.join(names)}, or leave the block out")
    rates = [optim.lr, optim.lr if optim.full_precision_lr is None else optim.full_precision_lr]  # low_rank first
    per_group = (rates,) if rates[0] != rates[1] else (rates[0], rates)
    warmup = max(1, optim.warmup_of(steps))  # DeepSpeed wants 1 at least
    asked = f"optim.warmup_steps is {optim.warmup_steps or 0}"
    if optim.warmup_fraction is not None:
        asked = f"optim.warmup_fraction is {optim.warmup_fraction} of {steps} steps"
    known = (
        _setting(f"{block}total_num_steps", "train.steps", steps),
        Rule(f"{block}warmup_num_steps", (warmup,), asked, f"{_AUTO}, or optim.warmup_steps: {{}}"),
        Rule(f"{block}warmup_max_lr", per_group, f"optim.lr and optim.full_precision_lr are {shown(rates)}", _AUTO),
        _setting(f"{block}cos_min_ratio", "optim.final_lr_fraction", optim.final_lr_fraction),
    )
    taken = inspect.signature(getattr(lr_schedules, name)).parameters
    yield from (rule for rule in known if rule.key.removeprefix(block) in taken)


def _compared_rules(config: RunConfig, file: File) -> Iterator[Rule]:
    """Values that are compared with ours where there are any."""
    optim, dtype, stage = config.optim, config.model.dtype, _stage(config, file)
    for name in ("lr", "eps", "weight_decay"):
        yield _setting(f"optimizer.params.{name}", f"optim.{name}", getattr(optim, name))
    yield _setting("optimizer.params.betas", "optim.betas", list(optim.betas))
    spellings = DTYPES[dtype]
    said = f"model.dtype is '{dtype}'"
    yield Rule("data_types.param_dtype", spellings, said, _AUTO)
    if _sums_in_16_bits(config, file):
        why = f"{said} and the stage is 1: DeepSpeed would take another optimizer, which merges do not know"
        yield Rule("data_types.grad_accum_dtype", spellings, why, f"{_AUTO}, or stage 2")
    if stage < 3:
        why = f"stage {stage} keeps every parameter whole on every rank"
        yield Rule(f"{_ZERO}offload_param.device", ("none",), why, 'write "none", or stage 3')
        if config.parallel.zero_offload == "parameters":
            raise ConfigError(
                f"parallel.zero_offload is 'parameters', but {why}; write parallel.zero_offload: optimizer, or stage 3"
            )
    if optim.schedule != "cosine":  # it is not the default: somebody asked for it
        yield Rule("scheduler.type", (), f"optim.schedule is '{optim.schedule}'", "leave one of the two out")
    if optim.states == "int8":
        why = "optim.states is 'int8', whose optimizer is not one of those that DeepSpeed knows"
        yield Rule("zero_allow_untested_optimizer", (True,), why, f"{_AUTO}, or optim.states: float32")
    if optim.name == "muon":
        why = "optim.name is 'muon', which is this package's own"
        yield Rule("zero_allow_untested_optimizer", (True,), why, f"{_AUTO}, or optim.name: adamw")
        yield Rule("optimizer.type", (), why, "leave the file's optimizer block out, or write optim.name: adamw")


def _check_optimizer(file: File) -> None:
    """DeepSpeed never sees the block, so it says nothing against it."""
    name = file.get("optimizer.type", "AdamW")
    if str(name).lower() not in ("adam", "adamw"):
        raise ConfigError(
            f"optimizer.type is {shown(name)}, but only AdamW is supported: DeepSpeed would build any other over every "
            'parameter, the frozen codes included; write "AdamW", or leave the block out'
        )
    known = {"type", *(f"params.{name}" for name in ("lr", "betas", "eps", "weight_decay", "torch_adam"))}
    known |= {rule.key.removeprefix("optimizer.") for rule in RULES}
    for key, value in file.items():
        if key.partition(".")[0] == "optimizer" and key.removeprefix("optimizer.") not in known:
            raise ConfigError(f"{key} is {shown(value)}, but AdamW has no such setting here; leave it out")


# ---- values ----------------------------------------------------------------------------------------------------------


def _has_scheduler(file: File) -> bool:
    return any(key.partition(".")[0] == "scheduler" for key in file)


def _stage(config: RunConfig, file: File) -> int:
    return config.parallel.zero_stage or int(file.get(f"{_ZERO}stage", 3))


def _offloaded(config: RunConfig, file: File) -> tuple[bool, bool]:
    """Whether optimizer states, and whether parameters, are kept in host memory."""
    offload = config.parallel.zero_offload
    if offload is not None:
        return offload != "none", offload == "parameters"
    return file.get(f"{_ZERO}offload_optimizer.device") == "cpu", file.get(f"{_ZERO}offload_param.device") == "cpu"


def _sums_in_16_bits(config: RunConfig, file: File) -> bool:
    """Whether gradients of micro-batches are added up in bfloat16.

    At stage 1, and unless the states are offloaded, float32 sums would make DeepSpeed choose its BF16_Optimizer.
    """
    return _stage(config, file) == 1 and config.model.dtype == "bfloat16" and not _offloaded(config, file)[0]


def _constants(config: RunConfig, file: File) -> dict[str, Any]:
    """What is ours to say where the JSON does not, and no setting."""
    values = {
        "bf16.check_grad_overflow": True,
        "fp16.enabled": False,
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        f"{_ZERO}round_robin_gradients": False,
        f"{_ZERO}memory_efficient_linear": False,  # else zero.Init replaces torch.nn.functional.linear, for good
    }
    if not _sums_in_16_bits(config, file):
        values["data_types.grad_accum_dtype"] = "fp32"
    persistent = {"prefetch_bucket_size": PREFETCH_BUCKET, "param_persistence_threshold": 0}  # small ones sharded too
    for name, value in persistent.items() if _stage(config, file) == 3 else ():
        if f"{_ZERO}{name}" not in file:  # DeepSpeed also knows it by this name, and takes the other if it has both
            values[f"{_ZERO}stage3_{name}"] = value
    if file.get("scheduler.type") == "OneCycle":
        values["scheduler.params.cycle_momentum"] = False  # it would replace both of optim.betas
    return values
