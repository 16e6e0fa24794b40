"""DeepSpeed's configuration: our settings, plus an optional DeepSpeed JSON (`parallel.zero_config`).

What the JSON leaves out, or writes as "auto", is filled from our settings. What both sides name must be the same, or is
refused with both values. What would break a run unnoticed is refused with the reason (`rules`). The rest is passed
on as it stands, and checked by DeepSpeed itself (`check`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loqt_scale.config import ParallelConfig, RunConfig
from loqt_scale.config.keys import flat_settings
from loqt_scale.errors import ConfigError, explained
from loqt_scale.functional.shares import micro_steps
from loqt_scale.strategies.zero.check import check_by_deepspeed
from loqt_scale.strategies.zero.rules import RULES, Rule, check_rules, flattened, nested, shown

LARGEST_BUCKET = 20_000_000  # values, of which DeepSpeed allocates a buffer; its default of 5e8 is 2 GB in float32
_ZERO = "zero_optimization."
_STAGE, _MOMENTS, _PARAMETERS = f"{_ZERO}stage", f"{_ZERO}offload_optimizer.device", f"{_ZERO}offload_param.device"
_OURS = {
    "bf16.check_grad_overflow": True,
    "fp16.enabled": False,
    "communication_data_type": "fp32",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    f"{_ZERO}round_robin_gradients": False,
    f"{_ZERO}memory_efficient_linear": False,  # else zero.Init replaces torch.nn.functional.linear, for good
    f"{_ZERO}stage3_prefetch_bucket_size": 50_000_000,
    f"{_ZERO}stage3_param_persistence_threshold": 0,  # small ones sharded too
}
"""What is filled in where the JSON says nothing, and is no setting."""
_SAME = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_clipping": "optim.clip_norm",
    "log_level": "parallel.zero_log_level",
    "optimizer.params.lr": "optim.lr",
    "optimizer.params.eps": "optim.eps",
    "optimizer.params.betas": "optim.betas",
    "optimizer.params.weight_decay": "optim.weight_decay",
}
"""Keys of the JSON that are one setting of ours each. Others mean what follows from several (`_shared`)."""
_SCHEDULERS = {"cosine": "WarmupCosineLR", "linear": "WarmupDecayLR", "constant": "WarmupLR"}  # optim.schedule: theirs
_ADAM = {"adamw": ("AdamW", "Adam", "adamw", "adam"), "muon": ()}  # optim.name: optimizer.type
_UNTOLD = ("optimizer", "scheduler", "train_batch_size", "sequence_parallel_size")  # compared, and DeepSpeed not told
_RATES = "the optimizer and its rates are those of optim.lr, optim.schedule, optim.warmup_steps ..."
_DTYPES = "dtypes follow model.dtype, and gradients add up in float32 where DeepSpeed can"
_CLOSED = {"optimizer": _RATES, "scheduler": _RATES, "data_types": _DTYPES}  # nobody checks what else is in them


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


def deepspeed_config(config: RunConfig, *, world_size: int) -> dict[str, Any]:
    """The configuration that `deepspeed.initialize` gets, checked; nothing in it is left as "auto".

    DeepSpeed (which must have been imported: `engine.import_deepspeed`) reads the result.

    Args:
        config: The run, whose strategy is zero.
        world_size: Ranks of the run.

    Returns:
        A fresh nested dict. It has no `optimizer` and no `scheduler`: the trainer has both. Sizes of buckets wait for
        the model (`size_buckets`).

    Raises:
        ConfigError: The JSON cannot be read, contradicts our settings or would break them, or DeepSpeed refuses it.
    """
    path = config.parallel.zero_config
    if path is None:
        return _merged(config, {}, world_size)
    tree = _read(path)
    try:
        return _merged(config, flattened(tree), world_size)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error.__cause__


def size_buckets(settings: dict[str, Any], trained_values: int) -> None:
    """Fills in the sizes of buckets that the JSON does not give: none need be larger than all the values that train."""
    bucket = max(1, min(LARGEST_BUCKET, trained_values))
    settings["zero_optimization"].setdefault("reduce_bucket_size", bucket)
    even = bucket + bucket % 2  # DeepSpeed wants an even number
    settings["zero_optimization"].setdefault("allgather_bucket_size", even)


def _read(path: str) -> dict[str, Any]:
    from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys as unique

    with explained(
        f"parallel.zero_config is '{path}', which cannot be read", of=(OSError, ValueError), kind=ConfigError
    ):
        tree = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: it holds {shown(tree)}; write an object such as {{...}}")
    return tree


def _merged(config: RunConfig, file: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    check_rules(file, RULES)
    shared = _shared(config, file, world_size)
    check_rules(file, shared)
    _refuse_unread(file, {rule.key for rule in (*RULES, *shared)})
    ours = {rule.key: rule.allowed[0] for rule in shared if rule.allowed not in ((), ("none",))} | _OURS
    # DeepSpeed knows some keys without "stage3_" too, and takes the other if it has both
    filled = {key: value for key, value in ours.items() if not {key, key.replace("stage3_", "")} & file.keys()}
    settings = nested({**file, **filled})
    for name in _UNTOLD:
        settings.pop(name, None)
    check_by_deepspeed(settings)
    return settings


def _shared(config: RunConfig, file: Mapping[str, Any], world_size: int) -> list[Rule]:
    """What both sides may name, with our value."""
    train, optim, dtype, offload = config.train, config.optim, config.model.dtype, config.parallel.zero_offload
    steps = micro_steps(train.global_batch_size, world_size, train.micro_batch_size)
    made = f"{train.global_batch_size} sequences (train.global_batch_size) on {world_size} rank(s) make {steps} passes"
    stage, devices = _stage(config, file), _offloaded(config, file)
    if stage < 3 and devices[_PARAMETERS] == "cpu":
        raise ConfigError(
            f"parameters are offloaded (parallel.zero_offload: parameters, or {_PARAMETERS}), but stage {stage} keeps "
            "all of them on every rank; write parallel.zero_stage: 3, or parallel.zero_offload: optimizer"
        )
    named = ", ".join(f"{theirs} is {ours}" for ours, theirs in _SCHEDULERS.items())
    schedulers = tuple(theirs for ours, theirs in _SCHEDULERS.items() if ours == optim.schedule)
    settings = flat_settings(config)
    return [
        *(_same(key, setting, settings[setting]) for key, setting in _SAME.items()),
        *(_same(key, "parallel.zero_offload", device, shown(offload)) for key, device in devices.items()),
        _same(_STAGE, "parallel.zero_stage", stage),
        _same("bf16.enabled", "model.dtype", dtype == "bfloat16", shown(dtype)),
        Rule("gradient_accumulation_steps", (steps,), made, "train.micro_batch_size"),
        _sums(config, file),
        Rule("optimizer.type", _ADAM[optim.name], f"optim.name is {shown(optim.name)}", "optim.name"),
        Rule("scheduler.type", schedulers, f"optim.schedule is {optim.schedule} ({named})", "optim.schedule"),
    ]


def _same(key: str, setting: str, value: Any, said: str = "") -> Rule:
    """One value of the JSON is one of ours; `said`: as the setting has it, if that is something else."""
    value = list(value) if isinstance(value, tuple) else value
    return Rule(key, (value,), f"{setting} is {said or shown(value)}", setting)


def _refuse_unread(file: Mapping[str, Any], read: set[str]) -> None:
    """Of the blocks that DeepSpeed does not see, or takes anything in, nothing may be passed over."""
    for key, value in file.items():
        ours = _CLOSED.get(key.partition(".")[0])
        if ours is not None and key not in {*read, "optimizer.params.torch_adam"}:
            raise ConfigError(f"{key} is {shown(value)}, but {ours}; leave it out")


def _stage(config: RunConfig, file: Mapping[str, Any]) -> int:
    return config.parallel.zero_stage or int(file.get(_STAGE, 3))


def _offloaded(config: RunConfig, file: Mapping[str, Any]) -> dict[str, str]:
    """Where optimizer states and parameters are kept: "cpu", or "none" for on the device."""
    if (offload := config.parallel.zero_offload) is None:
        return {key: file.get(key, "none") for key in (_MOMENTS, _PARAMETERS)}
    return {_MOMENTS: "none" if offload == "none" else "cpu", _PARAMETERS: "cpu" if offload == "parameters" else "none"}


def _sums(config: RunConfig, file: Mapping[str, Any]) -> Rule:
    """In which dtype gradients of micro-batches are added up.

    At stage 1 in bfloat16, unless the states are offloaded, float32 sums would make DeepSpeed choose its
    BF16_Optimizer, which merges do not know.
    """
    key, in_bfloat16 = "data_types.grad_accum_dtype", config.model.dtype == "bfloat16"
    if in_bfloat16 and _stage(config, file) == 1 and _offloaded(config, file)[_MOMENTS] == "none":
        why = "at stage 1 in bfloat16 DeepSpeed takes another optimizer for it, which merges do not know"
        return Rule(key, ("bf16",), why, "parallel.zero_stage")
    return Rule(key, ("fp32",), "gradients add up in float32")
