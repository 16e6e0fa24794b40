"""What DeepSpeed takes, and this package must refuse: its engine would ignore it, or break a run unnoticed.

Nothing else is listed: types, ranges and the names of keys are DeepSpeed's to check (`check`). What follows from a
run's settings is in `config`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from loqt_scale.errors import ConfigError, shortened


class Rule(NamedTuple):
    """What a file may say under a key, and under each key of a block that has no rule of its own.

    Args:
        allowed: The values that it may have; none: it is refused. The first is ours.
        why: What another value contradicts, as "optim.clip_norm is 1.0".
        setting: Ours that could be changed instead, if there is one.
    """

    allowed: tuple[Any, ...]
    why: str
    setting: str = ""


def _off(keys_by_reason: Mapping[str, str]) -> dict[str, Rule]:
    return {key: Rule((False,), why) for why, keys in keys_by_reason.items() for key in keys.split()}


_ZERO = "zero_optimization."
_OWN_OPTIMIZER = "the optimizer is this package's, also when it is offloaded"
_RATES = "the optimizer and its rates are those of optim.name, optim.lr, optim.schedule ..."
_GRADIENTS = "gradients here are sums, averaged by DeepSpeed over ranks and by nothing else"

_ENGINE_OFF = {
    "what trains and its optimizer states stay in float32": "bf16.bf16_master_weights_and_grads "
    "bf16.bf16_optimizer_states fp16.fp16_master_weights_and_grads",
    _OWN_OPTIMIZER: f"{_ZERO}offload_optimizer.super_offload",
    "a merge would then read and write the values of other parameters": f"{_ZERO}round_robin_gradients",
    "codes and scales are bytes, which must reach every rank as they are": f"{_ZERO}zero_quantized_weights "
    f"{_ZERO}zero_quantized_nontrainable_weights",
    "a sketch of a rounded gradient is no sketch of the gradient": f"{_ZERO}zero_quantized_gradients",
    "a layer's bytes and floats would be gathered in one buffer": f"{_ZERO}use_all_reduce_for_fetch_params "
    f"{_ZERO}stage3_use_all_reduce_for_fetch_params",
    "experts are not shared out over ranks here": "expert_parallel.enabled",
    "it is an engine for inference between steps": "hybrid_engine.enabled",
    "it replaces the hooks that merges rely on; for torch.compile write model.compile": "compile.deepcompile",
}
ENGINE_RULES = {
    **_off(_ENGINE_OFF),
    f"{_ZERO}offload_optimizer.device": Rule(("none", "cpu"), "NVMe is not supported"),
    f"{_ZERO}offload_optimizer.ratio": Rule((1.0,), "it needs an optimizer of DeepSpeed's own"),
    f"{_ZERO}offload_param.device": Rule(("none", "cpu"), "NVMe is not supported"),
    f"{_ZERO}zero_hpz_partition_size": Rule((1,), "second copies of shards would miss what a merge writes"),
    f"{_ZERO}mics_shard_size": Rule((), "other copies of shards would miss what a merge writes"),
    f"{_ZERO}zenflow": Rule((), "it updates gradients late, which a merge does not know of"),
    "sequence_parallel_size": Rule((1,), "ranks share out sequences, not their positions"),
    "tensor_parallel.autotp_size": Rule((0, 1), "layers are not cut over ranks during a step"),
    "pipeline": Rule((), "the model is not cut into pipeline stages here"),
    "weight_quantization": Rule((), "it would quantize matrices that LoQT has already quantized"),
}
"""What merges rely on, in an engine that somebody else made, too."""

_RUN_OFF = {
    "float16 is not supported: for 16 bits write model.dtype: bfloat16": "fp16.enabled",
    "the dtype of the forward pass is set by model.dtype": "torch_autocast.enabled",
    _GRADIENTS: "prescale_gradients",
    _OWN_OPTIMIZER: "zero_force_ds_cpu_optimizer",
    "batches come from this package's own data pipeline": "data_efficiency.enabled",
    "it ends the run to measure other settings": "autotuning.enabled",
    "activations are recomputed as model.activation_checkpointing says": "activation_checkpointing",
    # the loss that DeepSpeed would write is scaled up by the number of ranks, and wandb has one run per process
    "metrics are this package's own (train.run_dir)": "tensorboard.enabled wandb.enabled csv_monitor.enabled "
    "comet.enabled",
    "checkpoints are this package's own (checkpoint.*)": "checkpoint datastates_ckpt",
    "it is DeepSpeed's old spelling of parallel.zero_offload": f"{_ZERO}cpu_offload {_ZERO}cpu_offload_param",
}
RULES = {
    **ENGINE_RULES,
    **_off(_RUN_OFF),
    f"{_ZERO}stage": Rule((1, 2, 3), "ZeRO that shards nothing is parallel.strategy: ddp"),
    f"{_ZERO}compute_grad_norm": Rule((True,), "clipping and the check for finite gradients need the norm"),
    "bf16.check_grad_overflow": Rule((True,), "a gradient that is not finite would be applied, and not reported"),
    "gradient_predivide_factor": Rule((1.0,), _GRADIENTS),
    "gradient_allreduce_op": Rule(("mean",), _GRADIENTS),
    "managed_gradient_accumulation": Rule((True,), "the training loop marks the last micro-batch of a step itself"),
    "zero_allow_untested_optimizer": Rule((True,), "the optimizer is one that DeepSpeed has not tested"),
    "optimizer": Rule((), _RATES),
    "scheduler": Rule((), _RATES),
    "data_types": Rule((), "dtypes follow model.dtype"),
}
"""What holds for a run, whatever its settings are."""


def check_rules(file: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Refuses what the rules do not allow.

    Args:
        file: Dotted keys and values of the file.
        rules: By dotted key or block; the longest that fits a key of the file counts.

    Raises:
        ConfigError: The key, the file's value, what it contradicts, and what to write instead.
    """
    for key, value in file.items():
        parts = key.split(".")
        names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        rule = next((rules[name] for name in names if name in rules), None)
        if rule is not None and not any(_agree(value, allowed) for allowed in rule.allowed):
            raise ConfigError(f"{key} is {shown(value)}, but {rule.why}; {_remedy(rule)}")


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and values of what a file says. A value "auto" or null is left out: both mean "not said here"."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            values |= flattened(value, f"{prefix}{name}.")
        elif value is not None and value != "auto":
            values[prefix + name] = value
    return values


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of dotted keys that DeepSpeed reads; shares no dict with `values`.

    Raises:
        ConfigError: A key has a value, and a later one is below it.
    """
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *blocks, name = key.split(".")
        block = tree
        for above in blocks:
            block = block.setdefault(above, {})
            if not isinstance(block, dict):
                raise ConfigError(f'{above} is {shown(block)}; write an object such as {{"{name}": ...}}')
        block[name] = value
    return tree


def shown(value: Any) -> str:
    """A value as JSON writes it, shortened."""
    return shortened(json.dumps(value, ensure_ascii=False), 60)


def _remedy(rule: Rule) -> str:
    wanted = f"write {' or '.join(map(shown, rule.allowed))}, or " if rule.allowed else ""
    return f"{wanted}leave it out" + (f", or change {rule.setting}" if rule.setting else "")


def _agree(value: Any, allowed: Any) -> bool:
    return bool(value == allowed) and isinstance(value, bool) == isinstance(allowed, bool)  # True is not 1
