"""What DeepSpeed takes, and this package must refuse: its engine would ignore it, or break a run unnoticed.

Nothing else is listed: types, ranges and the names of keys are DeepSpeed's to check (`check`). Rules that come
from a run's settings are made in `config`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from loqt_scale.errors import ConfigError
from loqt_scale.strategies.zero.json import shown


class Rule(NamedTuple):
    """What the file may say under a key, if it says something.

    Args:
        key: A dotted key, or a block.
        allowed: The values that it may have; none: the key is refused. The first is ours.
        why: What another value contradicts, as "optim.clip_norm is 1.0".
        remedy: What to write instead; {} stands for the file's value.
    """

    key: str
    allowed: tuple[Any, ...]
    why: str
    remedy: str


_FP32, _BF16 = ("fp32", "float32", "torch.float32"), ("bf16", "bfloat16", "torch.bfloat16")
DTYPES = {"float32": _FP32, "bfloat16": _BF16}  # model.dtype: DeepSpeed's spellings
_NO = "leave it out"
_OFFLOAD = ("none", "cpu"), "NVMe is not supported", "write one of none, cpu"
_CHECKPOINTS = "checkpoints are this package's own (checkpoint.*)"
_OLD_OFFLOAD = "it is DeepSpeed's old spelling", "write parallel.zero_offload"
_SUMS = "gradients here are sums, averaged by DeepSpeed over ranks and by nothing else"
_STAGES = "stage 1 shards optimizer states, 2 gradients too, 3 everything (nothing sharded is parallel.strategy: ddp)"
# why a key must be false: the keys
_FALSE = {
    "float16 is not supported: for 16 bits write model.dtype: bfloat16": "fp16.enabled",
    "the values that train and their optimizer states stay in float32": """fp16.fp16_master_weights_and_grads
        bf16.bf16_master_weights_and_grads bf16.bf16_optimizer_states""",
    "the dtype of the forward pass is set by model.dtype": "torch_autocast.enabled",
    _SUMS: "prescale_gradients",
    "the optimizer is this package's, also when it is offloaded": """zero_force_ds_cpu_optimizer
        zero_optimization.offload_optimizer.super_offload""",
    "a merge would then read and write the float32 values of other parameters": """
        zero_optimization.round_robin_gradients""",
    "DeepSpeed no longer has it": "zero_optimization.legacy_stage1",
    "codes and scales are bytes, which must reach every rank as they are": """
        zero_optimization.zero_quantized_weights zero_optimization.zero_quantized_nontrainable_weights""",
    "a sketch of a rounded gradient is no sketch of the gradient": "zero_optimization.zero_quantized_gradients",
    "bytes and floats of a layer would be gathered in one buffer, which DeepSpeed cannot do": """
        zero_optimization.stage3_use_all_reduce_for_fetch_params zero_optimization.use_all_reduce_for_fetch_params""",
    "a merge carries over two moments of Adam, and this would be a third": "optimizer.params.amsgrad",
    "experts are not shared out over ranks here": "expert_parallel.enabled",
    "batches come from this package's own data pipeline": "data_efficiency.enabled",
    "it is an engine for inference between steps": "hybrid_engine.enabled",
    "it ends the run to measure other settings": "autotuning.enabled",
    "activations are recomputed by this package, as model.activation_checkpointing says": """
        activation_checkpointing.partition_activations activation_checkpointing.cpu_checkpointing""",
    "it replaces the hooks that merges rely on; for torch.compile write model.compile": "compile.deepcompile",
    "this package writes its own metrics and TensorBoard events (train.run_dir)": """tensorboard.enabled wandb.enabled
        csv_monitor.enabled comet.enabled""",
}
# the other keys that may have one value only: the value, and why
_ONE_VALUE = {
    "gradient_predivide_factor": (1.0, _SUMS),
    "gradient_allreduce_op": ("mean", _SUMS),
    "bf16.check_grad_overflow": (True, "a gradient that is not finite would be applied, and not reported"),
    "managed_gradient_accumulation": (True, "the training loop marks the last micro-batch of a step itself"),
    "zero_optimization.compute_grad_norm": (True, "clipping and the check for finite gradients need the norm"),
    "zero_optimization.zero_hpz_partition_size": (1, "the second copy of each shard would miss what a merge writes"),
    "zero_optimization.offload_optimizer.ratio": (1.0, "it needs an optimizer of DeepSpeed's own"),
    "optimizer.params.adam_w_mode": (True, "the optimizer is AdamW: weight decay is not part of the gradient"),
    "optimizer.params.bias_correction": (True, "the optimizer is torch's AdamW"),
    "sequence_parallel_size": (1, "ranks share out sequences, not their positions"),
    "tensor_parallel.autotp_size": (0, "layers are not cut over ranks during a step"),
}
RULES = (
    *(Rule(key, (False,), why, f"write false, or {_NO}") for why, keys in _FALSE.items() for key in keys.split()),
    *(Rule(key, (value,), why, f"write {shown(value)}, or {_NO}") for key, (value, why) in _ONE_VALUE.items()),
    Rule("zero_optimization.stage", (1, 2, 3), _STAGES, "write one of 1, 2, 3"),
    Rule("zero_optimization.offload_optimizer.device", *_OFFLOAD),
    Rule("zero_optimization.offload_param.device", *_OFFLOAD),
    Rule(
        "data_types.grad_accum_dtype", (*_FP32, *_BF16), "gradients add up in one of two dtypes", "write fp32 or bf16"
    ),
    Rule("scheduler.params.warmup_type", ("linear", "log"), "DeepSpeed would silently take log", "write linear or log"),
    Rule("pipeline", (), "the model is not cut into pipeline stages here", _NO),
    Rule("weight_quantization", (), "it would quantize matrices that LoQT has already quantized", _NO),
    Rule("checkpoint", (), _CHECKPOINTS, _NO),
    Rule("datastates_ckpt", (), _CHECKPOINTS, _NO),
    Rule("zero_optimization.zenflow", (), "it updates gradients late, which a merge does not know of", _NO),
    Rule("zero_optimization.cpu_offload", (), *_OLD_OFFLOAD),
    Rule("zero_optimization.cpu_offload_param", (), *_OLD_OFFLOAD),
    Rule("zero_optimization.cpu_offload_use_pin_memory", (), *_OLD_OFFLOAD),
)
"""What holds whatever a run's settings are."""

_OF_ENGINES = (
    "bf16.bf16_master_weights_and_grads",
    "bf16.bf16_optimizer_states",
    "fp16.fp16_master_weights_and_grads",
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
    "zero_optimization.round_robin_gradients",
    "zero_optimization.zero_quantized_weights",
    "zero_optimization.zero_quantized_nontrainable_weights",
    "zero_optimization.zero_quantized_gradients",
    "zero_optimization.stage3_use_all_reduce_for_fetch_params",
    "zero_optimization.use_all_reduce_for_fetch_params",
    "zero_optimization.zero_hpz_partition_size",
    "zero_optimization.zenflow",
    "expert_parallel.enabled",
    "hybrid_engine.enabled",
    "compile.deepcompile",
    "sequence_parallel_size",
    "tensor_parallel.autotp_size",
    "pipeline",
    "weight_quantization",
)
ENGINE_RULES = (
    *(rule for rule in RULES if any(rule.key == key or rule.key.startswith(f"{key}.") for key in _OF_ENGINES)),
    Rule("zero_optimization.mics_shard_size", (-1,), "a merge would miss the other copies of each shard", _NO),
)
"""What an engine that somebody else made may say: what merges rely on, and nothing of how the rest is trained."""


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
                raise ConfigError(f"{key} is {shown(value)}, but {rule.why}; {rule.remedy.replace('{}', shown(value))}")


def _agree(value: Any, allowed: Any) -> bool:
    return bool(value == allowed) and isinstance(value, bool) == isinstance(allowed, bool)  # True is not 1
