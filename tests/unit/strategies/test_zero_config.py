"""The configuration that DeepSpeed gets: what is filled, and DeepSpeed's own view of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loqt_scale.functional.shares import micro_steps
from loqt_scale.strategies.zero.config import size_buckets
from loqt_scale.strategies.zero.rules import nested
from tests.unit.strategies.zero_files import resolved, run

deepspeed = pytest.importorskip("deepspeed")

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
SHIPPED = sorted(CONFIGS.glob("zero_*.json"))


# ---- what is filled ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"), [(None, "auto", 3), (1, "auto", 1), (None, 2, 2), (2, 2, 2), (None, 1.0, 1)]
)
def test_stage(json_file, ours, theirs, expected):
    path = json_file({} if theirs is None else nested({"zero_optimization.stage": theirs}))
    assert resolved(run(zero_stage=ours, zero_config=path))["zero_optimization"]["stage"] == expected


def test_without_a_file_everything_is_ours():
    values = resolved(run(dtype="bfloat16", optim={"clip_norm": 0.0}, zero_log_level="info"))
    size_buckets(values, 1001)
    assert values == {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "log_level": "info",
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 1001,
            "allgather_bucket_size": 1002,
            "round_robin_gradients": False,
            "memory_efficient_linear": False,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 0,
        },
    }


@given(world_size=st.integers(1, 9), sequences=st.integers(1, 40), micro_batch=st.integers(1, 9))
def test_batches_are_those_of_the_training_loop(world_size, sequences, micro_batch):
    train = {"global_batch_size": sequences, "micro_batch_size": micro_batch}
    values = resolved(run(train=train), world_size)
    assert values["gradient_accumulation_steps"] == micro_steps(sequences, world_size, micro_batch)
    assert values["train_micro_batch_size_per_gpu"] == micro_batch


@pytest.mark.parametrize(
    ("trained", "reduce", "gather"), [(0, 1, 2), (1001, 1001, 1002), (10**10, 20_000_000, 20_000_000)]
)
def test_buckets_are_no_larger_than_the_model(trained, reduce, gather):
    settings = {"zero_optimization": {}}
    size_buckets(settings, trained)
    assert settings["zero_optimization"] == {"reduce_bucket_size": reduce, "allgather_bucket_size": gather}


@pytest.mark.parametrize("offload", ["none", "optimizer"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_add_up_in_float32_where_deepspeed_can(stage, dtype, offload):
    values = resolved(run(zero_stage=stage, dtype=dtype, zero_offload=offload))
    expected = "bf16" if (stage, dtype, offload) == (1, "bfloat16", "none") else "fp32"
    assert values["data_types"] == {"grad_accum_dtype": expected}


@pytest.mark.parametrize(
    ("stage", "ours", "theirs", "optimizer", "param"),
    [
        (3, "none", {}, None, None),
        (1, "optimizer", {}, "cpu", None),
        (3, "parameters", {"offload_param": "cpu", "offload_optimizer": "auto"}, "cpu", "cpu"),
        (3, None, {"offload_optimizer": "cpu", "offload_param": "cpu"}, "cpu", "cpu"),
        (2, "optimizer", {"offload_optimizer": "cpu", "offload_param": "none"}, "cpu", "none"),
    ],
)
def test_offload(json_file, stage, ours, theirs, optimizer, param):
    tree = nested({f"zero_optimization.{block}.device": device for block, device in theirs.items()})
    zero = resolved(run(zero_stage=stage, zero_offload=ours, zero_config=json_file(tree)))["zero_optimization"]
    assert zero.get("offload_optimizer", {}).get("device") == optimizer
    assert zero.get("offload_param", {}).get("device") == param


def test_what_is_not_ours_is_passed_on(json_file):
    """Blocks that DeepSpeed reads key by key, blocks that pydantic reads, and "auto" and null that are left out."""
    tree = {
        "wall_clock_breakdown": True,
        "communication_data_type": "bf16",
        "data_types": {"grad_accum_dtype": "fp32"},
        "flops_profiler": {"enabled": True, "module_depth": -1, "output_file": None},
        "aio": {"block_size": "auto", "queue_depth": 8},
        "activation_checkpointing": {"partition_activations": False, "profile": True},
        "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
        "zero_optimization": {
            "overlap_comm": True,
            "reduce_bucket_size": 2e5,
            "allgather_bucket_size": 4,
            "param_persistence_threshold": 7,
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
            "leaf_module": {"classes": ["Some.Class"]},
        },
        "tensor_parallel": {"autotp_size": 1},
    }
    values = resolved(run(zero_config=json_file(tree)), 1)
    theirs = deepspeed.DeepSpeedConfig(values)
    assert (theirs.zero_config.param_persistence_threshold, theirs.zero_config.prefetch_bucket_size) == (7, 50_000_000)
    size_buckets(values, 1000)
    zero = values.pop("zero_optimization")
    assert zero.items() >= tree.pop("zero_optimization").items()
    tree["flops_profiler"].pop("output_file")
    tree["aio"].pop("block_size")
    assert {key: values[key] for key in tree} == tree


def test_a_file_of_hugging_faces_trainer(json_file):
    """All is auto but types, which say what our settings say. What only it knows is left out or passed on."""
    auto = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    warmup = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto")
    tree = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "Adam", "params": auto},
        "scheduler": {"type": "WarmupDecayLR", "params": warmup},
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        **dict.fromkeys(("train_batch_size", "gradient_accumulation_steps", "gradient_clipping"), "auto"),
    }
    values, ours = (resolved(run(optim={"schedule": "linear"}, zero_config=path)) for path in (json_file(tree), None))
    for name in ("sub_group_size", "stage3_gather_16bit_weights_on_model_save"):
        assert values["zero_optimization"].pop(name) == tree["zero_optimization"][name]
    assert values.pop("fp16") == {**tree["fp16"], **ours.pop("fp16")}
    assert values == ours


# ---- the files we ship, and DeepSpeed's view ---------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shipped_files_fit_any_run(path, dtype):
    stage = int(path.stem[-1])
    settings = {"dtype": dtype, "optim": {"clip_norm": 0.25}, "train": {"global_batch_size": 7, "micro_batch_size": 2}}
    ours = resolved(run(zero_stage=stage, **settings))
    values = resolved(run(zero_config=str(path), **settings))
    assert values.pop("zero_optimization").items() >= ours.pop("zero_optimization").items()
    assert values == ours
    assert '"auto"' in path.read_text()
    for offload in ("none", "optimizer") if stage < 3 else ("none", "optimizer", "parameters"):
        resolved(run(zero_config=str(path), zero_offload=offload, **settings))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("stage", "offload"), [(1, "none"), (2, "optimizer"), (3, "none"), (3, "optimizer"), (3, "parameters")]
)
def test_deepspeed_understands(stage, offload, dtype):
    config = run(zero_stage=stage, zero_offload=offload, dtype=dtype, optim={"clip_norm": 0.0})
    theirs = deepspeed.DeepSpeedConfig(resolved(config, 1))
    zero = theirs.zero_config
    assert (zero.stage, zero.param_persistence_threshold, zero.prefetch_bucket_size) == (stage, 0, 50_000_000)
    assert (theirs.gradient_clipping, theirs.communication_data_type) == (0.0, torch.float32)
    assert (theirs.gradient_accumulation_steps, theirs.train_batch_size) == (4, 32)
    assert theirs.bfloat16_config.enabled == (dtype == "bfloat16")
    assert theirs.bfloat16_config.check_grad_overflow and not theirs.float16_config.enabled
    places = [getattr(block, "device", "none") for block in (zero.offload_optimizer, zero.offload_param)]
    assert places == ["none" if offload == "none" else "cpu", "cpu" if offload == "parameters" else "none"]
