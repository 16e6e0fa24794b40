"""The configuration that DeepSpeed gets: what is filled, what is refused in which words, and DeepSpeed's own view."""

from __future__ import annotations

import inspect
import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loqt_scale.config import ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from loqt_scale.config.yaml import parse_run_config
from loqt_scale.errors import ConfigError
from loqt_scale.functional.shares import micro_steps
from loqt_scale.strategies.zero.config import check_zero_config, deepspeed_config, resolve_zero_stage
from loqt_scale.strategies.zero.json import lookup
from loqt_scale.strategies.zero.keys import CHOICES, FIXED, KEYS, REFUSED, SCHEDULERS

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
SHIPPED = sorted(CONFIGS.glob("zero_*.json"))
WORLD_SIZE = 2


def run(*, dtype="float32", optim=None, train=None, strategy="zero", **parallel) -> RunConfig:
    """A run whose batch of 32 makes 2 micro-steps of 8 on each of 2 ranks."""
    return RunConfig(
        model=ModelConfig(dtype=dtype),
        optim=OptimConfig(**(optim or {})),
        parallel=ParallelConfig(strategy=strategy, **parallel),
        train=TrainConfig(**(train or {})),
    )


def nested(**values) -> dict:
    """{"a.b": 1} as {"a": {"b": 1}}."""
    tree: dict = {}
    for key, value in values.items():
        *blocks, name = key.split(".")
        block = tree
        for part in blocks:
            block = block.setdefault(part, {})
        block[name] = value
    return tree


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    """Writes an object, or a text, and returns its path."""
    folder = tmp_path_factory.mktemp("zero")
    names = itertools.count()

    def write(content) -> str:
        path = folder / f"{next(names)}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)

    return write


def resolved(config: RunConfig, trained_values: int = 1000) -> dict:
    check_zero_config(config, world_size=WORLD_SIZE)
    return deepspeed_config(config, world_size=WORLD_SIZE, trained_values=trained_values)


def refusal(config: RunConfig) -> str:
    """The message of a refused run: one line, and the same from both functions."""
    with pytest.raises(ConfigError) as caught:
        check_zero_config(config, world_size=WORLD_SIZE)
    with pytest.raises(ConfigError) as again:
        deepspeed_config(config, world_size=WORLD_SIZE, trained_values=1)
    message = str(caught.value)
    assert message == str(again.value)
    assert "\n" not in message
    return message


# ---- the command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--parallel.zero_stage", "4"], "parallel.zero_stage is 4; write one of 1, 2, 3 or null"),
        (["--parallel.zero_stage", "x"], "parallel.zero_stage is 'x'; write one of 1, 2, 3 or null"),
        (["--parallel.zero_stage", "true"], "parallel.zero_stage is 'true'; write one of 1, 2, 3 or null"),
        (
            ["--parallel.zero_offload", "disk"],
            "parallel.zero_offload is 'disk'; write one of none, optimizer, parameters or null",
        ),
        (["--optim.full_precision_lr", "x"], "optim.full_precision_lr is 'x'; write a number or null"),
    ],
)
def test_messages_for_settings_with_alternatives(argv, expected):
    with pytest.raises(ConfigError) as caught:
        parse_run_config(argv)
    assert str(caught.value) == expected


def test_settings_with_alternatives_are_read():
    parallel = parse_run_config(["--parallel.zero_stage", "2", "--parallel.zero_offload", "null"]).parallel
    assert (parallel.zero_stage, parallel.zero_offload) == (2, None)


# ---- what is filled ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [(None, None, 3), (1, None, 1), (None, 2, 2), (2, 2, 2), (None, "auto", 3), (1, "auto", 1), (None, 1.0, 1)],
)
def test_stage(json_file, ours, theirs, expected):
    tree = {} if theirs is None else nested(**{"zero_optimization.stage": theirs})
    config = run(zero_stage=ours, zero_config=json_file(tree))
    assert resolve_zero_stage(config) == expected
    assert resolved(config)["zero_optimization"]["stage"] == expected


def test_without_a_file_everything_is_ours():
    config = run(dtype="bfloat16", optim={"clip_norm": 0.0}, zero_log_level="info")
    assert resolved(config) == {
        "train_batch_size": 32,
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
            "reduce_bucket_size": 1000,
            "allgather_bucket_size": 1000,
            "round_robin_gradients": False,
            "memory_efficient_linear": False,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 0,
        },
    }


@given(
    world_size=st.integers(1, 9), sequences=st.integers(1, 40), micro_batch=st.integers(1, 9), stage=st.integers(1, 3)
)
def test_batches_are_those_of_the_training_loop(world_size, sequences, micro_batch, stage):
    train = {"global_batch_size": sequences, "micro_batch_size": micro_batch}
    values = deepspeed_config(run(train=train, zero_stage=stage), world_size=world_size, trained_values=1)
    steps = micro_steps(sequences, world_size, micro_batch)
    assert values["gradient_accumulation_steps"] == steps
    assert values["train_micro_batch_size_per_gpu"] == micro_batch
    assert values["train_batch_size"] == steps * micro_batch * world_size >= sequences


@pytest.mark.parametrize(
    ("trained", "reduce", "gather"),
    [(0, 1, 2), (1, 1, 2), (1001, 1001, 1002), (1000, 1000, 1000), (10**10, 20_000_000, 20_000_000)],
)
def test_buckets_are_no_larger_than_the_model(trained, reduce, gather):
    zero = resolved(run(zero_stage=2), trained)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (reduce, gather)


@pytest.mark.parametrize("offload", ["none", "optimizer"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_add_up_in_float32_where_deepspeed_can(stage, dtype, offload):
    values = resolved(run(zero_stage=stage, dtype=dtype, zero_offload=offload))
    expected = None if (stage, dtype, offload) == (1, "bfloat16", "none") else {"grad_accum_dtype": "fp32"}
    assert values.get("data_types") == expected


@pytest.mark.parametrize(
    ("stage", "ours", "theirs", "optimizer", "param"),
    [
        (3, None, {}, None, None),
        (3, "none", {}, None, None),
        (1, "optimizer", {}, "cpu", None),
        (3, "parameters", {}, "cpu", "cpu"),
        (3, "parameters", {"offload_param": "cpu", "offload_optimizer": "auto"}, "cpu", "cpu"),
        (2, None, {"offload_optimizer": "cpu"}, "cpu", None),
        (3, None, {"offload_optimizer": "cpu", "offload_param": "cpu"}, "cpu", "cpu"),
        (2, "optimizer", {"offload_optimizer": "cpu", "offload_param": "none"}, "cpu", "none"),
        (2, None, {"offload_param": "none"}, None, "none"),
    ],
)
def test_offload(json_file, stage, ours, theirs, optimizer, param):
    tree = nested(**{f"zero_optimization.{block}.device": device for block, device in theirs.items()})
    values = resolved(run(zero_stage=stage, zero_offload=ours, zero_config=json_file(tree)))
    assert lookup(values, "zero_optimization.offload_optimizer.device") == optimizer
    assert lookup(values, "zero_optimization.offload_param.device") == param


def test_settings_of_an_offload_block_are_kept(json_file):
    tree = nested(**{"zero_optimization.offload_optimizer.pin_memory": False})
    values = resolved(run(zero_offload="optimizer", zero_config=json_file(tree)))
    assert values["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}


def test_what_is_not_ours_is_passed_on(json_file):
    tree = {
        "steps_per_print": 10,
        "wall_clock_breakdown": True,
        "communication_data_type": "bf16",
        "flops_profiler": {"enabled": True, "module_depth": -1, "output_file": None},
        "data_types": {"grad_accum_dtype": "bf16"},
        "aio": {"block_size": "auto", "queue_depth": 8},
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": True,
            "reduce_bucket_size": 2e5,
            "allgather_bucket_size": 4,
            "leaf_module": {"classes": ["Some.Class"]},
        },
    }
    values = resolved(run(zero_config=json_file(tree)))
    assert {key: values[key] for key in tree} == {
        **tree,
        "flops_profiler": {"enabled": True, "module_depth": -1},
        "aio": {"queue_depth": 8},
        "zero_optimization": {
            **tree["zero_optimization"],
            "round_robin_gradients": False,
            "memory_efficient_linear": False,
        },
    }
    assert isinstance(values["zero_optimization"]["reduce_bucket_size"], int)


def test_an_accepted_optimizer_is_left_to_the_trainer(json_file):
    params = {"lr": "auto", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": "auto", "adam_w_mode": True}
    for name in ("AdamW", "Adam", "adamw", "auto"):
        assert "optimizer" not in resolved(run(zero_config=json_file({"optimizer": {"type": name, "params": params}})))


LINEAR = {"warmup_num_steps": 5, "warmup_max_lr": 0.25}


@pytest.mark.parametrize(
    ("name", "given_params", "optim", "expected"),
    [
        ("WarmupLR", {}, {}, LINEAR),
        ("WarmupDecayLR", {}, {}, {**LINEAR, "total_num_steps": 70}),
        ("WarmupDecayLR", {"total_num_steps": "auto", "warmup_type": "linear", "warmup_max_lr": 0.25}, {}, None),
        ("WarmupLR", {"warmup_max_lr": "auto"}, {"full_precision_lr": 0.5}, {"warmup_max_lr": [0.25, 0.5]}),
        ("WarmupLR", {"warmup_max_lr": [0.25, 0.5]}, {"full_precision_lr": 0.5}, None),
        ("WarmupLR", {"warmup_min_lr": 0.1, "warmup_num_steps": 5.0}, {}, {"warmup_min_lr": 0.1, **LINEAR}),
        ("WarmupLR", {}, {"warmup_steps": 0}, {"warmup_num_steps": 1}),
        ("WarmupLR", {}, {"warmup_steps": None, "warmup_fraction": 0.5}, {"warmup_num_steps": 35}),
        ("WarmupCosineLR", {}, {}, {"total_num_steps": 70, "warmup_num_steps": 5, "cos_min_ratio": 0.125}),
        ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2}, {}, {"cycle_momentum": False}),
        ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_momentum": True}, {}, {"cycle_momentum": True}),
        ("LRRangeTest", {"lr_range_test_min_lr": 0.1}, {}, {}),
    ],
)
def test_scheduler(json_file, name, given_params, optim, expected):
    ours = {"lr": 0.25, "warmup_steps": 5, "final_lr_fraction": 0.125, **optim}
    tree = {"scheduler": {"type": name, "params": given_params}}
    block = resolved(run(optim=ours, train={"steps": 70}, zero_config=json_file(tree)))["scheduler"]
    given_here = {key: value for key, value in given_params.items() if value != "auto"}
    assert block["type"] == name
    assert block["params"].items() >= {**given_here, **(expected or {})}.items()
    assert set(block["params"]) <= SCHEDULERS[name]
    assert "auto" not in block["params"].values()


# ---- what both sides name ----------------------------------------------------------------------------------------

NUMBERS = st.floats(1e-9, 1e9)
COUNTS = st.integers(1, 10**6)
# key of the JSON: our value, as `shared_run` sets it; the setting it must agree with; other values
SHARED = {
    "train_batch_size": (24, "train.global_batch_size", COUNTS),
    "train_micro_batch_size_per_gpu": (3, "train.micro_batch_size", COUNTS),
    "gradient_accumulation_steps": (4, "train.micro_batch_size", COUNTS),
    "gradient_clipping": (0.5, "optim.clip_norm", NUMBERS),
    "log_level": ("warning", "parallel.zero_log_level", st.sampled_from(["debug", "info", "critical"])),
    "bf16.enabled": (True, "model.dtype", st.just(False)),
    "data_types.param_dtype": ("bf16", "model.dtype", st.sampled_from(["fp32", "float16", "torch.float32"])),
    "optimizer.params.lr": (0.25, "optim.lr", NUMBERS),
    "optimizer.params.betas": ([0.5, 0.75], "optim.betas", st.lists(st.floats(0.0, 1.0), max_size=3)),
    "optimizer.params.eps": (1e-6, "optim.eps", NUMBERS),
    "optimizer.params.weight_decay": (0.125, "optim.weight_decay", NUMBERS),
    "scheduler.params.total_num_steps": (70, "train.steps", COUNTS),
    "scheduler.params.warmup_num_steps": (5, "optim.warmup_steps", COUNTS),
    "scheduler.params.warmup_max_lr": ([0.25, 0.375], "optim.full_precision_lr", NUMBERS | st.lists(NUMBERS)),
    "zero_optimization.stage": (2, "parallel.zero_stage", st.sampled_from([1, 3])),
    "zero_optimization.offload_optimizer.device": ("cpu", "parallel.zero_offload", st.just("none")),
    "zero_optimization.offload_param.device": ("none", "parallel.zero_offload", st.just("cpu")),
}


def shared_run(path: str) -> RunConfig:
    optim = {
        "lr": 0.25,
        "full_precision_lr": 0.375,
        "betas": (0.5, 0.75),
        "eps": 1e-6,
        "weight_decay": 0.125,
        "warmup_steps": 5,
        "clip_norm": 0.5,
    }
    return run(
        dtype="bfloat16",
        optim=optim,
        train={"global_batch_size": 24, "micro_batch_size": 3, "steps": 70},
        zero_stage=2,
        zero_offload="optimizer",
        zero_log_level="warning",
        zero_config=path,
    )


def shared_tree(**values) -> dict:
    return nested(**{"scheduler.type": "WarmupDecayLR", **values})


@given(forms=st.fixed_dictionaries({key: st.sampled_from(["missing", "auto", "null", "ours"]) for key in SHARED}))
def test_auto_is_missing_is_ours(json_file, forms):
    written = {"auto": "auto", "null": None}
    given_here = {key: written.get(form, SHARED[key][0]) for key, form in forms.items() if form != "missing"}
    expected = resolved(shared_run(json_file(shared_tree())))
    values = resolved(shared_run(json_file(shared_tree(**given_here))))
    for key in ("zero_optimization.offload_param", "data_types.param_dtype"):  # may be there, saying what is so
        *blocks, name = key.split(".")
        lookup(values, ".".join(blocks)).pop(name, None)
    assert values == expected


@pytest.mark.parametrize("key", SHARED)
def test_any_other_value_is_refused_with_both(json_file, key):
    ours, setting, others = SHARED[key]
    differing = others.filter(lambda value: value != ours)

    @given(value=differing)
    def refused(value):
        path = json_file(shared_tree(**{key: value}))
        message = refusal(shared_run(path))
        assert message.startswith(f"{path}: {key} is {json.dumps(value)[:50]}")
        assert setting in message
        assert '"auto"' in message
        if key in ("gradient_clipping", "train_batch_size", "optimizer.params.lr", "zero_optimization.stage"):
            assert f"{setting} is {ours};" in message
            assert message.endswith(f"or {setting}: {value}")

    refused()


@pytest.mark.parametrize(
    ("tree", "settings", "expected"),
    [
        (
            {"gradient_clipping": 0.5},
            {},
            'gradient_clipping is 0.5, but optim.clip_norm is 1.0; write "auto" in the file, or optim.clip_norm: 0.5',
        ),
        (
            {"zero_allow_untested_optimizer": False},
            {"optim": {"states": "int8"}},
            "zero_allow_untested_optimizer is false, but optim.states is 'int8', whose optimizer is not one of those "
            'that DeepSpeed knows; write "auto" in the file, or optim.states: float32',
        ),
        (
            {"gradient_accumulation_steps": 4},
            {},
            "gradient_accumulation_steps is 4, but train.global_batch_size 32 on 2 rank(s) in micro-batches of 8 "
            '(train.micro_batch_size) makes 2; write "auto" in the file',
        ),
        (
            {"bf16": {"enabled": True}},
            {},
            "bf16.enabled is true, but model.dtype is 'float32'; write \"auto\" in the file, or model.dtype: bfloat16",
        ),
        (
            {"zero_optimization": {"stage": 2}},
            {"zero_stage": 3},
            'zero_optimization.stage is 2, but parallel.zero_stage is 3; write "auto" in the file, or '
            "parallel.zero_stage: 2",
        ),
        (
            {"zero_optimization": {"stage": 0}},
            {},
            "zero_optimization.stage is 0; stage 1 shards optimizer states, 2 gradients too, 3 everything (nothing "
            "sharded is parallel.strategy: ddp); write one of 1, 2, 3",
        ),
        ({"zero_optimization": {"stage": 4}}, {"zero_stage": 3}, "zero_optimization.stage is 4; stage 1 shards"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/disk"}}},
            {},
            'zero_optimization.offload_optimizer.device is "nvme"; NVMe is not supported; write one of none, cpu',
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            {"zero_offload": "none"},
            "zero_optimization.offload_optimizer.device is \"cpu\", but parallel.zero_offload is 'none'; "
            'write "auto" in the file, or leave parallel.zero_offload out',
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            {},
            'zero_optimization.offload_param.device is "cpu", but stage 2 keeps every parameter whole on every rank; '
            'write "none", or stage 3',
        ),
        (
            {"zero_optimization": {"stage": 1}},
            {"zero_offload": "parameters"},
            "parallel.zero_offload is 'parameters', but stage 1 keeps every parameter whole on every rank; "
            "write parallel.zero_offload: optimizer, or stage 3",
        ),
        (
            {"fp16": {"enabled": True}},
            {"dtype": "bfloat16"},
            "fp16.enabled is true, but float16 is not supported: for 16 bits write model.dtype: bfloat16; write false",
        ),
        (
            {"data_types": {"grad_accum_dtype": "fp32"}},
            {"dtype": "bfloat16", "zero_stage": 1},
            "data_types.grad_accum_dtype is \"fp32\", but model.dtype is 'bfloat16' and the stage is 1: DeepSpeed",
        ),
        ({"optimizer": {"type": "Muon"}}, {}, 'optimizer.type is "Muon", but only AdamW is supported: DeepSpeed would'),
        ({"optimizer": {"type": "OneBitAdam"}}, {}, 'the frozen codes included; write "AdamW", or leave the block'),
        (
            {"optimizer": {"params": {"momentum": 0.9}}},
            {},
            "unknown key 'optimizer.params.momentum'; leave it out",
        ),
        ({"scheduler": {"params": {}}}, {}, "scheduler has no type; write one of WarmupLR, WarmupDecayLR"),
        ({"scheduler": {"type": "StepLR"}}, {}, 'scheduler.type is "StepLR"; write one of WarmupLR, WarmupDecayLR'),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 9}}},
            {},
            "scheduler.params.total_num_steps is no parameter of WarmupLR; it takes last_batch_iteration, warmup",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01}}},
            {"optim": {"full_precision_lr": 0.001}},
            "scheduler.params.warmup_max_lr is 0.01, but optim.lr and optim.full_precision_lr are [0.01, 0.001]; "
            'write "auto" in the file',
        ),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": {"cos_min_ratio": 0.5}}},
            {},
            "scheduler.params.cos_min_ratio is 0.5, but optim.final_lr_fraction is 0.1",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}},
            {"optim": {"warmup_fraction": 0.25}, "train": {"steps": 100}},
            "scheduler.params.warmup_num_steps is 9, but optim.warmup_fraction is 0.25 of 100 steps; write",
        ),
        (
            {"scheduler": {"type": "WarmupLR"}},
            {"optim": {"schedule": "wsd"}},
            "scheduler.type is \"WarmupLR\", but optim.schedule is 'wsd'; leave one of the two out",
        ),
        (
            {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 1e-3, "cycle_max_lr": "auto"}}},
            {},
            "scheduler.params.cycle_max_lr has no value, and no setting of ours is like it; write one",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}},
            {},
            "scheduler.params.warmup_num_steps is 0; write 1 or more",
        ),
        (
            {"zero_optimization": {"allgather_bucket_size": 7}},
            {},
            "allgather_bucket_size is 7; DeepSpeed wants an even",
        ),
        (
            {"zero_optimization": {"cpu_offload": True}},
            {},
            "zero_optimization.cpu_offload is true, but it is DeepSpeed's old spelling; write parallel.zero_offload, "
            'or "offload_optimizer": {"device": "cpu"}',
        ),
        ({"amp": {"enabled": False}}, {}, 'amp is {"enabled": false}, but DeepSpeed has removed it; leave it out'),
    ],
)
def test_contradictions(json_file, tree, settings, expected):
    path = json_file(tree)
    assert expected in refusal(run(zero_config=path, **settings)).removeprefix(f"{path}: ")


OTHER_VALUES = {bool: lambda allowed: not allowed, int: lambda allowed: allowed + 2, float: lambda allowed: allowed / 2}


@pytest.mark.parametrize("key", FIXED)
def test_what_would_break_a_run_is_refused_with_the_reason(json_file, key):
    allowed, reason = FIXED[key]
    wrong = "sum" if key == "gradient_allreduce_op" else OTHER_VALUES[type(allowed)](allowed)
    message = refusal(run(zero_config=json_file(nested(**{key: wrong}))))
    assert f"{key} is {json.dumps(wrong)}, but {reason}; write {json.dumps(allowed)}, or leave it out" in message
    for harmless in (allowed, "auto", None):
        resolved(run(zero_config=json_file(nested(**{key: harmless}))))


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_be_there_is_refused_with_the_reason(json_file, key):
    for value in (False, {"enabled": False}):
        assert f"{key} is {json.dumps(value)}, but " in refusal(run(zero_config=json_file(nested(**{key: value}))))
    resolved(run(zero_config=json_file(nested(**{key: None}))))


# ---- the file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"gradient_clipping": "1.0"}, 'gradient_clipping is "1.0"; write a number'),
        ({"gradient_clipping": True}, "gradient_clipping is true; write a number"),
        ({"train_batch_size": 32.5}, "train_batch_size is 32.5; write a whole number"),
        ({"steps_per_print": True}, "steps_per_print is true; write a whole number"),
        ({"steps_per_print": 0}, "steps_per_print is 0; write 1 or more"),
        ({"wall_clock_breakdown": 1}, "wall_clock_breakdown is 1; write true or false"),
        ({"communication_data_type": 32}, "communication_data_type is 32; write text"),
        ({"communication_data_type": "fp8"}, 'communication_data_type is "fp8"; write one of fp32, bf16, fp16'),
        ({"zero_optimization": True}, "zero_optimization is true; write an object such as {...}"),
        ({"bf16": "bf16"}, 'bf16 is "bf16"; write an object such as {...}'),
        ({"zero_optimization": {"stage": "3"}}, 'zero_optimization.stage is "3"; write a whole number'),
        (
            {"zero_optimization": {"overlap_comm": "yes"}},
            'zero_optimization.overlap_comm is "yes"; write true or false',
        ),
        ({"zero_optimization": {"sub_group_size": -1}}, "zero_optimization.sub_group_size is -1; write 0 or more"),
        (
            {"zero_optimization": {"reduce_bucket_size": 0}},
            "zero_optimization.reduce_bucket_size is 0; write 1 or more",
        ),
        ({"optimizer": {"params": {"betas": 0.9}}}, "optimizer.params.betas is 0.9; write a list"),
        ({"gradient_cliping": 1.0}, "unknown key 'gradient_cliping'; did you mean 'gradient_clipping'?"),
        ({"stage": 3}, "unknown key 'stage'; did you mean 'zero_optimization.stage'?"),
        (
            {"zero_optimization": {"param_persistence_threshold": 0}},
            "unknown key 'zero_optimization.param_persistence_threshold'; "
            "did you mean 'zero_optimization.stage3_param_persistence_threshold'?",
        ),
        ({"zzz": "auto"}, "unknown key 'zzz'; leave it out"),
        ([1], "it holds [1]; write an object such as {...}"),
        ("{\n  'a': 1}", "it is not JSON: line 2, column 3: Expecting property name enclosed in double quotes"),
        ('{"bf16": {"enabled": true, "enabled": false}}', "key 'enabled' is written twice; keep one of them"),
        ('{"gradient_clipping": NaN}', "it holds NaN, which is no number of JSON; write a number or null"),
        ('{"steps_per_print": 1e999}', "steps_per_print is Infinity; write a whole number"),
        ("", "it is not JSON: line 1, column 1: Expecting value"),
    ],
)
def test_messages_about_the_file(json_file, tree, expected):
    path = json_file(tree)
    message = refusal(run(zero_config=path))
    assert message == f"{path}: {expected}"
    with pytest.raises(ConfigError):
        resolve_zero_stage(run(zero_config=path))


def test_files_that_cannot_be_read(tmp_path):
    absent = str(tmp_path / "absent.json")
    assert refusal(run(zero_config=absent)) == (
        f"parallel.zero_config is '{absent}', which does not exist; write a JSON file"
    )
    assert f"parallel.zero_config is '{tmp_path}', which cannot be read: " in refusal(run(zero_config=str(tmp_path)))
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    assert "which cannot be read: " in refusal(run(zero_config=str(tmp_path / "latin.json")))


def test_a_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "mark.json"
    path.write_bytes(b"\xef\xbb\xbf{}")
    assert resolved(run(zero_config=str(path))) == resolved(run())


@pytest.mark.parametrize("strategy", ["auto", "single", "ddp", "fsdp"])
@pytest.mark.parametrize(
    ("name", "value"), [("zero_config", "absent.json"), ("zero_stage", 2), ("zero_offload", "optimizer")]
)
def test_settings_of_zero_belong_to_zero(strategy, name, value):
    with pytest.raises(ConfigError) as caught:
        check_zero_config(run(strategy=strategy, **{name: value}), world_size=1)
    assert str(caught.value) == (
        f"parallel.{name} is {value!r}, but parallel.strategy is '{strategy}'; "
        f"write parallel.strategy: zero, or leave parallel.{name} out"
    )
    check_zero_config(run(strategy=strategy, zero_offload="none"), world_size=1)


# ---- the files we ship -------------------------------------------------------------------------------------------


def test_there_is_a_file_for_every_stage():
    assert [path.stem for path in SHIPPED] == ["zero_1", "zero_2", "zero_3"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shipped_files_fit_any_run(path, dtype):
    stage = int(path.stem[-1])
    settings = {"dtype": dtype, "optim": {"clip_norm": 0.25}, "train": {"global_batch_size": 7, "micro_batch_size": 2}}
    ours = resolved(run(zero_stage=stage, **settings))
    values = resolved(run(zero_config=str(path), **settings))
    assert {key: values[key] for key in ours if key != "zero_optimization"} == {
        key: ours[key] for key in ours if key != "zero_optimization"
    }
    assert values["zero_optimization"].items() >= ours["zero_optimization"].items()
    assert '"auto"' in path.read_text()
    assert '"auto"' not in json.dumps(values)
    for offload in ("none", "optimizer") if stage < 3 else ("none", "optimizer", "parameters"):
        resolved(run(zero_config=str(path), zero_offload=offload, **settings))


# ---- DeepSpeed's view --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deepspeed():
    return pytest.importorskip("deepspeed")


def one_rank(config: RunConfig) -> dict:
    """What a run of one rank gives: without a process group, DeepSpeed counts one."""
    return deepspeed_config(config, world_size=1, trained_values=1001)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("stage", "offload"),
    [(1, "none"), (1, "optimizer"), (2, "none"), (2, "optimizer"), (3, "none"), (3, "optimizer"), (3, "parameters")],
)
@pytest.mark.parametrize("shipped", [False, True])
def test_deepspeed_accepts_and_understands(deepspeed, stage, offload, dtype, shipped):
    path = str(CONFIGS / f"zero_{stage}.json") if shipped else None
    config = run(zero_stage=stage, zero_offload=offload, dtype=dtype, zero_config=path, optim={"clip_norm": 0.0})
    theirs = deepspeed.DeepSpeedConfig(one_rank(config))
    zero = theirs.zero_config
    assert (zero.stage, theirs.gradient_clipping, theirs.steps_per_print) == (stage, 0.0, None)
    assert theirs.bfloat16_config.enabled == (dtype == "bfloat16")
    assert theirs.bfloat16_config.check_grad_overflow
    assert not theirs.float16_config.enabled
    assert theirs.communication_data_type == torch.float32
    assert theirs.gradient_accumulation_steps == 4
    assert zero.reduce_bucket_size == 1001
    assert not zero.memory_efficient_linear
    assert theirs.zero_allow_untested_optimizer
    assert not theirs.zero_force_ds_cpu_optimizer
    if stage == 3:
        assert (zero.param_persistence_threshold, zero.prefetch_bucket_size) == (0, 50_000_000)
    places = [getattr(block, "device", "none") for block in (zero.offload_optimizer, zero.offload_param)]
    assert places == [
        "none" if offload == "none" else "cpu",
        "cpu" if offload == "parameters" else "none",
    ]


def test_we_know_the_keys_that_deepspeed_knows(deepspeed):
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    models = {
        "zero_optimization.": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer.": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param.": DeepSpeedZeroOffloadParamConfig,
        "bf16.": DeepSpeedBF16Config,
        "fp16.": DeepSpeedFP16Config,
    }
    removed = {"mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"}
    for prefix, model in models.items():
        theirs = {field.alias or name for name, field in model.model_fields.items()}
        ours = {key.removeprefix(prefix) for key in (*KEYS, *REFUSED) if key.startswith(prefix)}
        assert {key for key in ours if "." not in key} - removed == theirs, prefix


class Recorder(dict):
    """A configuration that notes which keys are asked for."""

    def __init__(self, values, asked):
        super().__init__(values)
        self.asked = asked

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self):
        return self

    def __copy__(self):
        return Recorder(dict(self.items()), self.asked)


def test_we_know_the_top_level_keys_that_deepspeed_reads(deepspeed):
    asked: set[str] = set()
    deepspeed.DeepSpeedConfig(Recorder(one_rank(run()), asked))
    ours = {key for key in (*KEYS, *REFUSED) if "." not in key}
    assert len(asked) > 40
    assert asked <= ours
    # read where there are several ranks, or in place of another key
    assert ours - asked <= {"data_parallel_size", "sequence_parallel_size", "bfloat16"}


def test_we_refuse_what_deepspeed_has_removed(deepspeed):
    from deepspeed.runtime import config

    removed = {
        *config._REMOVED_TOP_LEVEL_CONFIG_KEYS,
        *(f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS),
    }
    assert removed == {key for key, reason in REFUSED.items() if "removed" in reason}


def test_we_know_the_schedulers_of_deepspeed(deepspeed):
    from deepspeed.runtime import lr_schedules

    assert set(SCHEDULERS) == set(lr_schedules.VALID_LR_SCHEDULES)
    assert CHOICES["scheduler.type"][0] == tuple(SCHEDULERS)
    for name, parameters in SCHEDULERS.items():
        assert parameters == set(inspect.signature(getattr(lr_schedules, name)).parameters) - {"optimizer"}


@pytest.mark.parametrize("name", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"])
def test_schedulers_keep_the_rates_of_both_groups(deepspeed, json_file, name):
    from deepspeed.runtime import lr_schedules

    path = json_file({"scheduler": {"type": name, "params": {"warmup_type": "linear"}}})
    optim = {"lr": 0.25, "full_precision_lr": 0.5, "warmup_steps": 4}
    block = one_rank(run(optim=optim, train={"steps": 9}, zero_config=path))["scheduler"]
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.25, 0.5)]
    optimizer = torch.optim.AdamW(groups)
    scheduler = getattr(lr_schedules, name)(optimizer, **block["params"])
    rates = []
    for _ in range(6):
        rates.append([group["lr"] for group in optimizer.param_groups])
        scheduler.step()
    assert all(second == pytest.approx(2 * first) for first, second in rates)
    assert 0.22 < max(rates)[0] <= 0.25
