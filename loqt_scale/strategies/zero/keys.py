"""What a DeepSpeed configuration may hold: every key with its type, and what this package must refuse, with the reason.

Data only, taken from DeepSpeed 0.19; a test compares it with the DeepSpeed that is installed. A key inside a block is
written with dots: `zero_optimization.stage`.
"""

from __future__ import annotations

Kind = type  # bool, int, float, str, list, dict, or object for anything

_KEYS: dict[str, dict[Kind, str]] = {
    "": {
        int: """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps steps_per_print
            vocabulary_size sequence_parallel_size data_parallel_size""",
        float: "gradient_clipping gradient_predivide_factor",
        bool: """prescale_gradients managed_gradient_accumulation zero_allow_untested_optimizer
            zero_force_ds_cpu_optimizer disable_allgather disable_python_gc dump_state wall_clock_breakdown
            memory_breakdown dataloader_drop_last use_data_before_expert_parallelism""",
        str: "communication_data_type seq_parallel_communication_data_type gradient_allreduce_op log_level",
        dict: """zero_optimization bf16 fp16 data_types optimizer scheduler torch_autocast activation_checkpointing aio
            autotuning checkpoint comms_logger compile csv_monitor comet tensorboard wandb data_efficiency
            datastates_ckpt expert_parallel flops_profiler hybrid_engine tensor_parallel timers""",
    },
    "zero_optimization.": {
        int: """stage reduce_bucket_size allgather_bucket_size sub_group_size stage3_prefetch_bucket_size
            stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters
            stage3_max_reuse_distance stage3_module_granularity_threshold zero_hpz_partition_size""",
        bool: """contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions overlap_comm
            compute_grad_norm load_from_fp32_weights elastic_checkpoint stage3_gather_16bit_weights_on_model_save
            stage3_gather_fp16_weights_on_model_save stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential
            ignore_unused_parameters legacy_stage1 round_robin_gradients parameter_alignment zero_quantized_weights
            zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear
            pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks
            save_muon_momentum_buffer_in_memory""",
        dict: "offload_optimizer offload_param leaf_module",
    },
    "zero_optimization.offload_optimizer.": {
        str: "device nvme_path",
        int: "buffer_count",
        float: "ratio cpuadam_cores_perc",
        bool: "pin_memory pipeline_read pipeline_write fast_init super_offload",
    },
    "zero_optimization.offload_param.": {
        str: "device nvme_path",
        int: "buffer_count buffer_size max_in_cpu",
        bool: "pin_memory",
    },
    "bf16.": {
        bool: "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states",
    },
    "fp16.": {
        bool: "enabled auto_cast consecutive_hysteresis fp16_master_weights_and_grads",
        int: "initial_scale_power loss_scale_window hysteresis min_loss_scale",
        float: "loss_scale",
    },
    "data_types.": {str: "grad_accum_dtype param_dtype buffer_dtype", list: "keep_in_fp32_modules"},
    "optimizer.": {str: "type", dict: "params", bool: "legacy_fusion"},
    "optimizer.params.": {
        float: "lr eps weight_decay",
        list: "betas",
        bool: "adam_w_mode torch_adam bias_correction amsgrad",
    },
    "scheduler.": {str: "type", dict: "params"},
    "scheduler.params.": {
        int: "total_num_steps warmup_num_steps lr_range_test_step_size last_batch_iteration",
        float: """warmup_min_ratio cos_min_ratio lr_range_test_step_rate decay_lr_rate decay_mom_rate decay_step_size
            cycle_first_step_size cycle_second_step_size""",
        bool: "lr_range_test_staircase cycle_momentum",
        str: "warmup_type",
        object: """warmup_min_lr warmup_max_lr lr_range_test_min_lr cycle_min_lr cycle_max_lr cycle_min_mom
            cycle_max_mom cycle_first_stair_count cycle_second_stair_count""",
    },
}

KEYS: dict[str, Kind] = {
    prefix + name: kind for prefix, kinds in _KEYS.items() for kind, names in kinds.items() for name in names.split()
}
"""Every key but those of `REFUSED`, dotted, and the type of its value. A block without keys here is free in form."""

_WARMUP = "warmup_min_lr warmup_max_lr warmup_num_steps warmup_type last_batch_iteration"
SCHEDULERS: dict[str, frozenset[str]] = {
    name: frozenset(parameters.split())
    for name, parameters in {
        "WarmupLR": _WARMUP,
        "WarmupDecayLR": f"total_num_steps {_WARMUP}",
        "WarmupCosineLR": """total_num_steps warmup_min_ratio warmup_num_steps cos_min_ratio warmup_type
            last_batch_iteration""",
        "OneCycle": """cycle_min_lr cycle_max_lr decay_lr_rate cycle_first_step_size cycle_second_step_size
            cycle_first_stair_count cycle_second_stair_count decay_step_size cycle_momentum cycle_min_mom cycle_max_mom
            decay_mom_rate last_batch_iteration""",
        "LRRangeTest": """lr_range_test_min_lr lr_range_test_step_size lr_range_test_step_rate lr_range_test_staircase
            last_batch_iteration""",
    }.items()
}
"""DeepSpeed's schedulers and the parameters of each."""

REQUIRED_PARAMETERS: dict[str, tuple[str, ...]] = {"OneCycle": ("cycle_min_lr", "cycle_max_lr")}
"""Parameters of a scheduler that neither DeepSpeed nor our settings have a value for."""

DTYPES: dict[str, str] = {
    name: dtype
    for dtype, names in {
        "float32": "torch.float32 fp32 float32 float",
        "bfloat16": "torch.bfloat16 bf16 bfloat16",
        "float16": "torch.float16 fp16 float16 half",
    }.items()
    for name in names.split()
}
"""DeepSpeed's spellings of a dtype, and ours."""

_OFFLOAD = ("none", "cpu"), "NVMe is not supported; "
CHOICES: dict[str, tuple[tuple[object, ...], str]] = {
    "zero_optimization.stage": (
        (1, 2, 3),
        "stage 1 shards optimizer states, 2 gradients too, 3 everything (nothing sharded is parallel.strategy: ddp); ",
    ),
    "zero_optimization.offload_optimizer.device": _OFFLOAD,
    "zero_optimization.offload_param.device": _OFFLOAD,
    "communication_data_type": (("fp32", "bf16", "fp16"), ""),
    "data_types.grad_accum_dtype": (tuple(DTYPES), ""),
    "data_types.param_dtype": (tuple(DTYPES), ""),
    "data_types.buffer_dtype": (tuple(DTYPES), ""),
    "scheduler.type": (tuple(SCHEDULERS), ""),
    "scheduler.params.warmup_type": (("linear", "log"), ""),
}
"""Keys with a short list of values: the list, and what to say before it."""

POSITIVE = frozenset(
    {
        "steps_per_print",
        "zero_optimization.reduce_bucket_size",
        "scheduler.params.total_num_steps",
        "scheduler.params.warmup_num_steps",
        "scheduler.params.lr_range_test_step_size",
        "scheduler.params.cycle_first_step_size",
    }
)
"""Numbers that must be 1 or more; other numbers outside `scheduler.params` must be 0 or more."""

_REMOVED_KEYS = """amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula
    progressive_layer_drop quantize_training sparse_attention sparse_gradients zero_optimization.mics_shard_size
    zero_optimization.mics_hierarchical_params_gather zero_optimization.zeropp_loco_param"""
_OLD_OFFLOAD = 'it is DeepSpeed\'s old spelling; write parallel.zero_offload, or "{}": {{"device": "cpu"}}'
REFUSED: dict[str, str] = {
    **dict.fromkeys(_REMOVED_KEYS.split(), "DeepSpeed has removed it; leave it out"),
    "bfloat16": 'it is DeepSpeed\'s old spelling; write "bf16"',
    "pipeline": "the model is not cut into pipeline stages here; leave it out",
    "weight_quantization": "it would quantize matrices that LoQT has already quantized; leave it out",
    "zero_optimization.zenflow": "it updates part of the gradients late, which a merge does not know of; leave it out",
    "zero_optimization.cpu_offload": _OLD_OFFLOAD.format("offload_optimizer"),
    "zero_optimization.cpu_offload_param": _OLD_OFFLOAD.format("offload_param"),
    "zero_optimization.cpu_offload_use_pin_memory": 'it is DeepSpeed\'s old spelling; write "pin_memory" in the block',
}
"""Keys that are refused whatever they say, and why."""

_SUMS = "gradients here are sums, averaged by DeepSpeed over ranks and by nothing else"
_BYTES = "codes and scales are bytes, which must reach every rank as they are"
_MASTERS = "the values that train and their optimizer states stay in float32"
_ONE_STREAM = "this package writes its own metrics and TensorBoard events (train.run_dir)"
FIXED: dict[str, tuple[object, str]] = {
    "fp16.enabled": (False, "float16 is not supported: for 16 bits write model.dtype: bfloat16"),
    "fp16.fp16_master_weights_and_grads": (False, _MASTERS),
    "bf16.bf16_master_weights_and_grads": (False, _MASTERS),
    "bf16.bf16_optimizer_states": (False, _MASTERS),
    "bf16.check_grad_overflow": (True, "a gradient that is not finite would be applied, and not reported"),
    "torch_autocast.enabled": (False, "the dtype of the forward pass is set by model.dtype"),
    "prescale_gradients": (False, _SUMS),
    "gradient_predivide_factor": (1.0, _SUMS),
    "gradient_allreduce_op": ("mean", _SUMS),
    "managed_gradient_accumulation": (True, "the training loop marks the last micro-batch of a step itself"),
    "zero_force_ds_cpu_optimizer": (False, "the optimizer is this package's, also when it is offloaded"),
    "zero_optimization.round_robin_gradients": (
        False,
        "a merge would then read and write the float32 values of other parameters",
    ),
    "zero_optimization.legacy_stage1": (False, "DeepSpeed no longer has it"),
    "zero_optimization.compute_grad_norm": (True, "clipping and the check for finite gradients need the norm"),
    "zero_optimization.zero_quantized_weights": (False, _BYTES),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, _BYTES),
    "zero_optimization.zero_quantized_gradients": (
        False,
        "a sketch of a rounded gradient is no sketch of the gradient",
    ),
    "zero_optimization.zero_hpz_partition_size": (1, "the second copy of each shard would miss what a merge writes"),
    "zero_optimization.offload_optimizer.ratio": (1.0, "it needs an optimizer of DeepSpeed's own"),
    "zero_optimization.offload_optimizer.super_offload": (False, "it needs an optimizer of DeepSpeed's own"),
    "optimizer.params.adam_w_mode": (True, "the optimizer is AdamW: weight decay is not part of the gradient"),
    "optimizer.params.bias_correction": (True, "the optimizer is torch's AdamW"),
    "optimizer.params.amsgrad": (False, "a merge carries over two moments of Adam, and this would be a third"),
    "sequence_parallel_size": (1, "ranks share out sequences, not their positions"),
    "tensor_parallel.autotp_size": (0, "layers are not cut over ranks during a step"),
    "expert_parallel.enabled": (False, "there are no experts"),
    "data_efficiency.enabled": (False, "batches come from this package's own data pipeline"),
    "hybrid_engine.enabled": (False, "it is an engine for inference between steps"),
    "autotuning.enabled": (False, "it ends the run to measure other settings"),
    "compile.deepcompile": (False, "it replaces the hooks that merges rely on; for torch.compile write model.compile"),
    **dict.fromkeys(
        ("tensorboard.enabled", "wandb.enabled", "csv_monitor.enabled", "comet.enabled"), (False, _ONE_STREAM)
    ),
}
"""Keys that are refused unless they have this value, and why."""
