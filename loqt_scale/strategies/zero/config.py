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
    _STAGE: 3,
    "bf16.check_grad_overflow": True,
    "communication_data_type": "fp32",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    f"{_ZERO}memory_efficient_linear": False,  # else zero.Init replaces torch.nn.functional.linear, for good
    f"{_ZERO}stage3_param_persistence_threshold": 0,  # small ones sharded too
}
"""What is filled in where neither the JSON nor a setting says something."""
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
_ADAM = {"adamw": ("AdamW", "Adam", "adamw", "adam")}  # optim.name: optimizer.type
_SCHEDULERS = {"cosine": ("WarmupCosineLR",), "linear": ("WarmupDecayLR",), "constant": ("WarmupLR",)}
_UNTOLD = ("optimizer", "scheduler", "train_batch_size", "sequence_parallel_size")  # compared, and DeepSpeed not told
_SUMS = "gradients add up in float32; at stage 1 in bfloat16 not, since merges do not know the optimizer that does it"


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
    stage, devices = _sharding(config.parallel, file)
    shared = _shared(config, world_size, stage, devices)
    check_rules(file, {**RULES, **shared})
    if stage < 3 and devices[_PARAMETERS] == "cpu":
        raise ConfigError(
            f"parameters are offloaded (parallel.zero_offload: parameters, or {_PARAMETERS}), but stage {stage} keeps "
            "all of them on every rank; write parallel.zero_stage: 3, or parallel.zero_offload: optimizer"
        )
    ours = _OURS | {key: rule.allowed[0] for key, rule in shared.items() if rule.allowed not in ((), ("none",))}
    # DeepSpeed knows some keys without "stage3_" too, but not twice
    filled = {key: value for key, value in ours.items() if not {key, key.replace("stage3_", "")} & file.keys()}
    told = {key: value for key, value in {**file, **filled}.items() if key.partition(".")[0] not in _UNTOLD}
    settings = nested(told)
    check_by_deepspeed(settings)
    return settings


def _sharding(parallel: ParallelConfig, file: Mapping[str, Any]) -> tuple[int, dict[str, str]]:
    """The stage, and by key where moments and parameters are kept: "cpu", or "none" for on the device."""
    offload = parallel.zero_offload
    devices = {key: file.get(key, "none") for key in (_MOMENTS, _PARAMETERS)}
    if offload is not None:
        devices[_MOMENTS] = "none" if offload == "none" else "cpu"
        devices[_PARAMETERS] = "cpu" if offload == "parameters" else "none"
    return parallel.zero_stage or file.get(_STAGE, _OURS[_STAGE]), devices


def _shared(config: RunConfig, world_size: int, stage: int, devices: Mapping[str, str]) -> dict[str, Rule]:
    """What both sides may name, with our value; nothing where we have none."""
    train, parallel, dtype, schedule = config.train, config.parallel, config.model.dtype, config.optim.schedule
    steps = micro_steps(train.global_batch_size, world_size, train.micro_batch_size)
    made = f"{train.global_batch_size} sequences (train.global_batch_size) on {world_size} rank(s) make {steps} passes"
    in_bfloat16 = dtype == "bfloat16"
    sums = "bf16" if in_bfloat16 and stage == 1 and devices[_MOMENTS] == "none" else "fp32"
    settings = flat_settings(config)
    rules = {key: _same(setting, settings[setting]) for key, setting in _SAME.items()}
    if parallel.zero_stage is not None:
        rules[_STAGE] = _same("parallel.zero_stage", stage)
    if parallel.zero_offload is not None:
        said = shown(parallel.zero_offload)
        rules |= {key: _same("parallel.zero_offload", device, said) for key, device in devices.items()}
    return rules | {
        "bf16.enabled": _same("model.dtype", in_bfloat16, shown(dtype)),
        "gradient_accumulation_steps": Rule((steps,), made, "train.micro_batch_size"),
        "data_types.grad_accum_dtype": Rule((sums,), _SUMS),
        "optimizer.type": Rule(_ADAM.get(config.optim.name, ()), f"optim.name is {config.optim.name}", "optim.name"),
        "scheduler.type": Rule(_SCHEDULERS.get(schedule, ()), f"optim.schedule is {schedule}", "optim.schedule"),
    }


def _same(setting: str, value: Any, said: str = "") -> Rule:
    """One value of the JSON is one of ours; `said`: as the setting has it, if that is something else."""
    value = list(value) if isinstance(value, tuple) else value
    return Rule((value,), f"{setting} is {said or shown(value)}", setting)
