"""What DeepSpeed takes, and this package must refuse: its engine would ignore it, or break a run unnoticed.

Nothing else is listed: types, ranges and the names of keys are DeepSpeed's to check (`check`). What comes from a
run's settings is in `config`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from loqt_scale.errors import ConfigError


class Rule(NamedTuple):
    """What a file may say under a key, if it says something.

    Args:
        key: A dotted key, or a block.
        allowed: The values that it may have; none: the key is refused. The first is ours.
        why: What another value contradicts, as "optim.clip_norm is 1.0".
        setting: Ours that could be changed instead, if there is one.
    """

    key: str
    allowed: tuple[Any, ...]
    why: str
    setting: str = ""


_OFF = (False,)
_ON = (True,)
_ZERO = "zero_optimization."
_FLOAT32 = "what trains and its optimizer states stay in float32"
_DEVICES = "NVMe is not supported"
_OWN_OPTIMIZER = "the optimizer is this package's, also when it is offloaded"
_OTHERS = "a merge would then read and write the float32 values of other parameters"
_PACKED = "codes and scales are bytes, which must reach every rank as they are"
_ROUNDED = "a sketch of a rounded gradient is no sketch of the gradient"
_GATHERS = "bytes and floats of a layer would be gathered in one buffer, which DeepSpeed cannot do"
_COPIES = "the other copies of each shard would miss what a merge writes"
_HOOKS = "it replaces the hooks that merges rely on; for torch.compile write model.compile"
_STAGES = "stage 1 shards optimizer states, 2 gradients too, 3 everything (nothing sharded is parallel.strategy: ddp)"
_FINITE = "a gradient that is not finite would be applied, and not reported"
_SUMS = "gradients here are sums, averaged by DeepSpeed over ranks and by nothing else"
_MOMENTS = "a merge carries over two moments of Adam, and this would be a third"
_ACTIVATIONS = "activations are recomputed by this package, as model.activation_checkpointing says"
_METRICS = "this package writes its own metrics and TensorBoard events (train.run_dir)"
_CHECKPOINTS = "checkpoints are this package's own (checkpoint.*)"
_OLD_OFFLOAD = "it is DeepSpeed's old spelling of parallel.zero_offload"

ENGINE_RULES = (
    Rule("bf16.bf16_master_weights_and_grads", _OFF, _FLOAT32),
    Rule("bf16.bf16_optimizer_states", _OFF, _FLOAT32),
    Rule("fp16.fp16_master_weights_and_grads", _OFF, _FLOAT32),
    Rule(f"{_ZERO}offload_optimizer.device", ("none", "cpu"), _DEVICES),
    Rule(f"{_ZERO}offload_optimizer.ratio", (1.0,), "it needs an optimizer of DeepSpeed's own"),
    Rule(f"{_ZERO}offload_optimizer.super_offload", _OFF, _OWN_OPTIMIZER),
    Rule(f"{_ZERO}offload_param.device", ("none", "cpu"), _DEVICES),
    Rule(f"{_ZERO}round_robin_gradients", _OFF, _OTHERS),
    Rule(f"{_ZERO}zero_quantized_weights", _OFF, _PACKED),
    Rule(f"{_ZERO}zero_quantized_nontrainable_weights", _OFF, _PACKED),
    Rule(f"{_ZERO}zero_quantized_gradients", _OFF, _ROUNDED),
    Rule(f"{_ZERO}stage3_use_all_reduce_for_fetch_params", _OFF, _GATHERS),
    Rule(f"{_ZERO}use_all_reduce_for_fetch_params", _OFF, _GATHERS),
    Rule(f"{_ZERO}zero_hpz_partition_size", (1,), _COPIES),
    Rule(f"{_ZERO}mics_shard_size", (), _COPIES),
    Rule(f"{_ZERO}zenflow", (), "it updates gradients late, which a merge does not know of"),
    Rule("expert_parallel.enabled", _OFF, "experts are not shared out over ranks here"),
    Rule("hybrid_engine.enabled", _OFF, "it is an engine for inference between steps"),
    Rule("compile.deepcompile", _OFF, _HOOKS),
    Rule("sequence_parallel_size", (1,), "ranks share out sequences, not their positions"),
    Rule("tensor_parallel.autotp_size", (0, 1), "layers are not cut over ranks during a step"),
    Rule("pipeline", (), "the model is not cut into pipeline stages here"),
    Rule("weight_quantization", (), "it would quantize matrices that LoQT has already quantized"),
)
"""What merges rely on, in an engine that somebody else made, too."""

RULES = (
    *ENGINE_RULES,
    Rule(f"{_ZERO}stage", (1, 2, 3), _STAGES),
    Rule("fp16.enabled", _OFF, "float16 is not supported: for 16 bits write model.dtype: bfloat16"),
    Rule("torch_autocast.enabled", _OFF, "the dtype of the forward pass is set by model.dtype"),
    Rule("bf16.check_grad_overflow", _ON, _FINITE),
    Rule(f"{_ZERO}compute_grad_norm", _ON, "clipping and the check for finite gradients need the norm"),
    Rule("prescale_gradients", _OFF, _SUMS),
    Rule("gradient_predivide_factor", (1.0,), _SUMS),
    Rule("gradient_allreduce_op", ("mean",), _SUMS),
    Rule("managed_gradient_accumulation", _ON, "the training loop marks the last micro-batch of a step itself"),
    Rule("zero_force_ds_cpu_optimizer", _OFF, _OWN_OPTIMIZER),
    Rule("zero_allow_untested_optimizer", _ON, "the optimizer is this package's, which DeepSpeed has not tested"),
    Rule("optimizer.params.adam_w_mode", _ON, "the optimizer is AdamW: weight decay is not part of the gradient"),
    Rule("optimizer.params.bias_correction", _ON, "the optimizer is AdamW, which corrects it"),
    Rule("optimizer.params.amsgrad", _OFF, _MOMENTS),
    Rule("scheduler.params.warmup_type", ("linear",), "the warm-up, optim.warmup_steps, is a line"),
    Rule("data_efficiency.enabled", _OFF, "batches come from this package's own data pipeline"),
    Rule("autotuning.enabled", _OFF, "it ends the run to measure other settings"),
    Rule("activation_checkpointing.partition_activations", _OFF, _ACTIVATIONS),
    Rule("activation_checkpointing.cpu_checkpointing", _OFF, _ACTIVATIONS),
    Rule("tensorboard.enabled", _OFF, _METRICS),
    Rule("wandb.enabled", _OFF, _METRICS),
    Rule("csv_monitor.enabled", _OFF, _METRICS),
    Rule("comet.enabled", _OFF, _METRICS),
    Rule("checkpoint", (), _CHECKPOINTS),
    Rule("datastates_ckpt", (), _CHECKPOINTS),
    Rule(f"{_ZERO}cpu_offload", (), _OLD_OFFLOAD),
    Rule(f"{_ZERO}cpu_offload_param", (), _OLD_OFFLOAD),
    Rule(f"{_ZERO}cpu_offload_use_pin_memory", (), _OLD_OFFLOAD),
)
"""What holds for a run, whatever its settings are."""


def check_rules(file: Mapping[str, Any], rules: Iterable[Rule]) -> None:
    """Refuses what the rules do not allow.

    Args:
        file: Dotted keys and values of the file.
        rules: Of any keys.

    Raises:
        ConfigError: The key, the file's value, what it contradicts, and what to write instead.
    """
    for rule in rules:
        for key, value in file.items():
            covered = key == rule.key or key.startswith(f"{rule.key}.")
            if covered and not any(_agree(value, allowed) for allowed in rule.allowed):
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
            found = block.setdefault(above, {})
            if not isinstance(found, dict):
                raise ConfigError(f'{above} is {shown(found)}; write an object such as {{"{name}": ...}}')
            block = found
        block[name] = value
    return tree


def shown(value: Any) -> str:
    """A value as JSON writes it, shortened."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _remedy(rule: Rule) -> str:
    wanted = f"write {' or '.join(map(shown, rule.allowed))}, or " if rule.allowed else ""
    return f"{wanted}leave it out" + (f", or change {rule.setting}" if rule.setting else "")


def _agree(value: Any, allowed: Any) -> bool:
    return bool(value == allowed) and isinstance(value, bool) == isinstance(allowed, bool)  # True is not 1
