"""The configuration that DeepSpeed gets: what is filled, what is refused in which words, and DeepSpeed's own view."""

from __future__ import annotations

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
from loqt_scale.strategies.zero.config import check_zero_unused, deepspeed_config, names_scheduler, size_buckets
from loqt_scale.strategies.zero.json import nested
from loqt_scale.strategies.zero.keys import RULES

deepspeed = pytest.importorskip("deepspeed")

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


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    """Writes a nested dict, or a text, and returns its path."""
    folder = tmp_path_factory.mktemp("zero")
    names = itertools.count()

    def write(content) -> str:
        path = folder / f"{next(names)}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)

    return write


def resolved(config: RunConfig, world_size: int = WORLD_SIZE) -> dict:
    return deepspeed_config(config, world_size=world_size)


def refusal(config: RunConfig) -> str:
    """The message of a refused run: one line."""
    with pytest.raises(ConfigError) as caught:
        resolved(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--parallel.zero_stage", "4"], "parallel.zero_stage is 4; write one of 1, 2, 3 or null"),
        (["--parallel.zero_stage", "true"], "parallel.zero_stage is 'true'; write one of 1, 2, 3 or null"),
        (
            ["--parallel.zero_offload", "disk"],
            "parallel.zero_offload is 'disk'; write one of none, optimizer, parameters or null",
        ),
    ],
)
def test_messages_for_settings_with_alternatives(argv, expected):
    with pytest.raises(ConfigError) as caught:
        parse_run_config(argv)
    assert str(caught.value) == expected


@pytest.mark.parametrize("strategy", ["auto", "single", "ddp", "fsdp"])
@pytest.mark.parametrize(
    ("name", "value"), [("zero_config", "absent.json"), ("zero_stage", 2), ("zero_offload", "optimizer")]
)
def test_settings_of_zero_belong_to_zero(strategy, name, value):
    with pytest.raises(ConfigError) as caught:
        check_zero_unused(ParallelConfig(strategy=strategy, **{name: value}))
    assert str(caught.value) == (
        f"parallel.{name} is {value!r}, but parallel.strategy is '{strategy}'; "
        f"write parallel.strategy: zero, or leave parallel.{name} out"
    )
    check_zero_unused(ParallelConfig(strategy=strategy, zero_offload="none"))


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
    expected = None if (stage, dtype, offload) == (1, "bfloat16", "none") else {"grad_accum_dtype": "fp32"}
    assert values.get("data_types") == expected


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
        "steps_per_print": 10,
        "wall_clock_breakdown": True,
        "communication_data_type": "bf16",
        "flops_profiler": {"enabled": True, "module_depth": -1, "output_file": None},
        "data_types": {"grad_accum_dtype": "bf16"},
        "aio": {"block_size": "auto", "queue_depth": 8},
        "activation_checkpointing": {"partition_activations": False, "profile": True},
        "tensorboard": {"enabled": False, "output_path": "events"},
        "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
        "timers": {"throughput": {"enabled": False}},
        "compile": {"deepcompile": False},
        "torch_autocast": {"enabled": False, "dtype": "bfloat16"},
        "fp16": {"enabled": False, "loss_scale": 0},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "reduce_bucket_size": 2e5,
            "allgather_bucket_size": 4,
            "param_persistence_threshold": 7,
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
            "leaf_module": {"classes": ["Some.Class"]},
        },
    }
    values = resolved(run(zero_config=json_file(tree)))
    size_buckets(values, 1000)
    for key in ("round_robin_gradients", "memory_efficient_linear", "stage3_prefetch_bucket_size"):
        values["zero_optimization"].pop(key)
    tree["flops_profiler"].pop("output_file")
    tree["aio"].pop("block_size")
    assert {key: values[key] for key in tree} == tree
    config = deepspeed.DeepSpeedConfig(resolved(run(zero_config=json_file(tree)), 1))
    assert config.zero_config.param_persistence_threshold == 7


def test_a_file_of_hugging_faces_trainer(json_file):
    auto = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    warmup = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto")
    buckets = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    batches = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    tree = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "Adam", "params": auto},
        "scheduler": {"type": "WarmupDecayLR", "params": warmup},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "sub_group_size": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
            **dict.fromkeys(buckets, "auto"),
        },
        **dict.fromkeys((*batches, "gradient_clipping"), "auto"),
        "steps_per_print": 1e5,
    }
    config = run(optim={"warmup_steps": 5}, train={"steps": 70}, zero_config=json_file(tree))
    values = resolved(config)
    assert values["scheduler"]["params"] == {"total_num_steps": 70, "warmup_num_steps": 5, "warmup_max_lr": 0.01}
    assert '"auto"' not in json.dumps(values) and "optimizer" not in values
    assert names_scheduler(config)


LINEAR = {"warmup_num_steps": 5, "warmup_max_lr": 0.25}


@pytest.mark.parametrize(
    ("name", "given_params", "optim", "expected"),
    [
        ("WarmupLR", {}, {}, LINEAR),
        ("WarmupDecayLR", {"total_num_steps": "auto", "warmup_type": "linear"}, {}, {**LINEAR, "total_num_steps": 70}),
        ("WarmupLR", {"warmup_max_lr": "auto"}, {"full_precision_lr": 0.5}, {"warmup_max_lr": [0.25, 0.5]}),
        ("WarmupLR", {"warmup_max_lr": [0.25, 0.5]}, {"full_precision_lr": 0.5}, {"warmup_num_steps": 5}),
        ("WarmupLR", {"warmup_max_lr": [0.25, 0.25]}, {}, {"warmup_num_steps": 5}),
        ("WarmupLR", {}, {"warmup_steps": 0}, {"warmup_num_steps": 1, "warmup_max_lr": 0.25}),
        ("WarmupLR", {}, {"warmup_steps": None, "warmup_fraction": 0.5}, {"warmup_num_steps": 35}),
        ("WarmupCosineLR", {}, {}, {"total_num_steps": 70, "warmup_num_steps": 5, "cos_min_ratio": 0.125}),
        ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2}, {}, {"cycle_momentum": False}),
        ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_momentum": True}, {}, {}),
        ("LRRangeTest", {"lr_range_test_min_lr": 0.1}, {}, {}),
    ],
)
def test_scheduler(json_file, name, given_params, optim, expected):
    """What is given stays, and what is ours is filled in: no more than the scheduler can be given."""
    ours = {"lr": 0.25, "warmup_steps": 5, "final_lr_fraction": 0.125, **optim}
    path = json_file({"scheduler": {"type": name, "params": given_params}})
    block = resolved(run(optim=ours, train={"steps": 70}, zero_config=path))["scheduler"]
    given_here = {key: value for key, value in given_params.items() if value != "auto"}
    assert block["type"] == name
    assert block["params"].items() >= {**expected, **given_here}.items()
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
    "data_types.param_dtype": ("bf16", "model.dtype", st.sampled_from(["fp32", "float16"])),
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
    rates = {"lr": 0.25, "full_precision_lr": 0.375, "warmup_steps": 5, "clip_norm": 0.5}
    optim = {**rates, "betas": (0.5, 0.75), "eps": 1e-6, "weight_decay": 0.125}
    train = {"global_batch_size": 24, "micro_batch_size": 3, "steps": 70}
    ours = {"zero_stage": 2, "zero_offload": "optimizer", "zero_log_level": "warning"}
    return run(dtype="bfloat16", optim=optim, train=train, zero_config=path, **ours)


def shared_tree(**values) -> dict:
    return nested({"scheduler.type": "WarmupDecayLR", **values})


@given(forms=st.fixed_dictionaries({key: st.sampled_from(["missing", "auto", "null", "ours"]) for key in SHARED}))
def test_auto_is_missing_is_ours(json_file, forms):
    written = {"auto": "auto", "null": None}
    given_here = {key: written.get(form, SHARED[key][0]) for key, form in forms.items() if form != "missing"}
    expected = resolved(shared_run(json_file(shared_tree())))
    values = resolved(shared_run(json_file(shared_tree(**given_here))))
    for block, name in (("zero_optimization", "offload_param"), ("data_types", "param_dtype")):
        values[block].pop(name, None)  # may be there, saying what is so
    assert values == expected


@pytest.mark.parametrize("key", SHARED)
def test_any_other_value_is_refused_with_both(json_file, key):
    ours, setting, others = SHARED[key]

    @given(value=others.filter(lambda value: value != ours))
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


# what the file says, what our settings say: how the message begins
CONTRADICTIONS = [
    (
        {"zero_allow_untested_optimizer": False},
        {"optim": {"states": "int8"}},
        "zero_allow_untested_optimizer is false, but optim.states is 'int8', whose optimizer is not one of those",
    ),
    (
        {"optimizer.type": "AdamW"},
        {"optim": {"name": "muon"}},
        "optimizer.type is \"AdamW\", but optim.name is 'muon', which is this package's own; leave the file's",
    ),
    (
        {"gradient_accumulation_steps": 4},
        {},
        "gradient_accumulation_steps is 4, but train.global_batch_size 32 on 2 rank(s) in micro-batches of 8 "
        '(train.micro_batch_size) makes 2; write "auto" in the file',
    ),
    (
        {"zero_optimization.stage": 2, "zero_optimization.offload_param.device": "cpu"},
        {},
        'zero_optimization.offload_param.device is "cpu", but stage 2 keeps every parameter whole on every rank; ',
    ),
    (
        {"zero_optimization.stage": 1},
        {"zero_offload": "parameters"},
        "parallel.zero_offload is 'parameters', but stage 1 keeps every parameter whole on every rank; write parallel",
    ),
    (
        {"fp16.enabled": True, "bf16.enabled": True},
        {"dtype": "bfloat16"},
        "fp16.enabled is true, but float16 is not supported: for 16 bits write model.dtype: bfloat16; write false",
    ),
    (
        {"data_types.grad_accum_dtype": "fp32"},
        {"dtype": "bfloat16", "zero_stage": 1},
        "data_types.grad_accum_dtype is \"fp32\", but model.dtype is 'bfloat16' and the stage is 1: DeepSpeed would",
    ),
    ({"optimizer.type": "OneBitAdam"}, {}, 'optimizer.type is "OneBitAdam", but only AdamW is supported: DeepSpeed'),
    ({"optimizer.params.momentum": 0.9}, {}, "optimizer.params.momentum is 0.9, but AdamW has no such setting here"),
    ({"scheduler.params.warmup_num_steps": 3}, {}, "scheduler has no type; write one of LRRangeTest, OneCycle,"),
    ({"scheduler.type": "StepLR"}, {}, 'scheduler.type is "StepLR"; write one of LRRangeTest, OneCycle, WarmupLR,'),
    (
        {"scheduler.type": "WarmupLR", "scheduler.params.warmup_max_lr": 0.01},
        {"optim": {"full_precision_lr": 0.001}},
        "scheduler.params.warmup_max_lr is 0.01, but optim.lr and optim.full_precision_lr are [0.01, 0.001]; write",
    ),
    (
        {"scheduler.type": "WarmupCosineLR", "scheduler.params.cos_min_ratio": 0.5},
        {},
        "scheduler.params.cos_min_ratio is 0.5, but optim.final_lr_fraction is 0.1; write",
    ),
    (
        {"scheduler.type": "WarmupLR", "scheduler.params.warmup_num_steps": 9},
        {"optim": {"warmup_fraction": 0.25}, "train": {"steps": 100}},
        "scheduler.params.warmup_num_steps is 9, but optim.warmup_fraction is 0.25 of 100 steps; write",
    ),
    (
        {"scheduler.type": "WarmupLR"},
        {"optim": {"schedule": "wsd"}},
        "scheduler.type is \"WarmupLR\", but optim.schedule is 'wsd'; leave one of the two out",
    ),
]


@pytest.mark.parametrize(("values", "settings", "expected"), CONTRADICTIONS)
def test_contradictions(json_file, values, settings, expected):
    path = json_file(nested(values))
    assert refusal(run(zero_config=path, **settings)).startswith(f"{path}: {expected}")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.key)
def test_what_would_break_a_run_is_refused_with_the_reason(json_file, rule):
    wrong = not rule.allowed[0] if rule.allowed and isinstance(rule.allowed[0], bool) else 7
    message = refusal(run(zero_config=json_file(nested({rule.key: wrong}))))
    assert message.endswith(f"{rule.key} is {json.dumps(wrong)}, but {rule.why}; {rule.remedy}")
    for harmless in (*rule.allowed[:1], "auto", None):
        values = {"scheduler.type": "WarmupLR"} if rule.key.startswith("scheduler") else {}
        resolved(run(zero_config=json_file(nested({**values, rule.key: harmless}))))


# ---- what DeepSpeed refuses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"zero_optimization.overlap_comm": "perhaps"}, 'is "perhaps", which DeepSpeed refuses: Input should be a'),
        ({"zero_optimization.reduce_bucket_size": 0}, "is 0, which DeepSpeed refuses: Input should be greater than 0"),
        ({"communication_data_type": "fp8"}, 'is "fp8", which DeepSpeed refuses: Invalid communication_data_type'),
        ({"communication_data_type": {"a": 1}}, "is 1, which DeepSpeed refuses: "),
        ({"flops_profiler": True}, "is true, which DeepSpeed refuses: "),
        ({"data_types.buffer_dtype": "fp9"}, 'is "fp9", which DeepSpeed refuses: '),
        ({"steps_per_print": 0}, "is 0, which DeepSpeed refuses: ZeroDivisionError"),
        ({"zero_optimization.allgather_bucket_size": 7}, "is 7, which DeepSpeed refuses: Input should be an even"),
        ({"amp.enabled": True}, "is true, which DeepSpeed refuses: NVIDIA Apex AMP integration has been removed"),
    ],
)
def test_a_refused_value_is_named_with_deepspeeds_reason(json_file, values, expected):
    path = json_file(nested({"steps_per_print": 10, "aio.queue_depth": 8, **values}))
    (key,) = values
    key += ".a" if isinstance(values[key], dict) else ""
    assert refusal(run(zero_config=path)).startswith(f"{path}: {key} {expected}")


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"total_num_steps": 9}, "unexpected keyword argument 'total_num_steps'"),
        ({"warmup_min_lr": [0.1]}, "expected 2 value for min_lr, got 1"),
    ],
)
def test_a_refused_scheduler_is_said_in_deepspeeds_words(json_file, params, expected):
    path = json_file({"scheduler": {"type": "WarmupLR", "params": params}})
    message = refusal(run(zero_config=path))
    assert message.startswith(f"{path}: DeepSpeed refuses these settings: ") and expected in message


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("gradient_cliping", "gradient_clipping"),
        ("stage", "zero_optimization.stage"),
        ("bfloat16", "bf16"),
        ("zero_optimization.overlap_com", "zero_optimization.overlap_comm"),
        ("zero_optimization.prefetch_bucket_siz", "zero_optimization.stage3_prefetch_bucket_size"),
        ("zero_optimization.offload_optimizer.pin_memry", "zero_optimization.offload_optimizer.pin_memory"),
        ("bf16.enable", "bf16.enabled"),
        ("data_types.grad_acc_dtype", "data_types.grad_accum_dtype"),
        ("flops_profiler.enable", "flops_profiler.enabled"),
    ],
)
def test_an_unknown_key_is_said_with_the_nearest(json_file, key, nearest):
    for value in (1, {"enabled": 1}):
        path = json_file(nested({"flops_profiler.module_depth": -1, key: value}))
        assert refusal(run(zero_config=path)) == f"{path}: DeepSpeed has no key '{key}'; did you mean '{nearest}'?"
    path = json_file(nested({key.replace(key.rpartition(".")[2], "zzz"): 1}))
    assert refusal(run(zero_config=path)).endswith("zzz'; leave it out")


# ---- the file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"zero_optimization": True}, 'zero_optimization is true; write an object such as {"stage": ...}'),
        ({"bf16": "bf16"}, 'bf16 is "bf16"; write an object such as {"enabled": ...}'),
        ([1], "it holds [1]; write an object such as {...}"),
        ("{\n  'a': 1}", "it is not JSON: line 2, column 3: Expecting property name enclosed in double quotes"),
        ("{\n  // why\n}", "it is not JSON: line 2, column 3: a comment, which JSON does not have; leave it out"),
        ('{"a": 1 # why\n}', "it is not JSON: line 1, column 9: a comment, which JSON does not have; leave it out"),
        ('{"bf16": {"enabled": true, "enabled": false}}', "key 'enabled' is written twice; keep one of them"),
        ("", "it is not JSON: line 1, column 1: Expecting value"),
    ],
)
def test_messages_about_the_file(json_file, tree, expected):
    path = json_file(tree)
    assert refusal(run(zero_config=path)) == f"{path}: {expected}"


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
@pytest.mark.parametrize("shipped", [False, True])
@pytest.mark.parametrize(
    ("stage", "offload"), [(1, "none"), (2, "optimizer"), (3, "none"), (3, "optimizer"), (3, "parameters")]
)
def test_deepspeed_understands(stage, offload, dtype, shipped):
    path = str(CONFIGS / f"zero_{stage}.json") if shipped else None
    config = run(zero_stage=stage, zero_offload=offload, dtype=dtype, zero_config=path, optim={"clip_norm": 0.0})
    theirs = deepspeed.DeepSpeedConfig(resolved(config, 1))
    zero = theirs.zero_config
    assert (zero.stage, theirs.gradient_clipping, theirs.steps_per_print) == (stage, 0.0, None)
    assert theirs.bfloat16_config.enabled == (dtype == "bfloat16")
    assert theirs.bfloat16_config.check_grad_overflow and not theirs.float16_config.enabled
    assert theirs.communication_data_type == torch.float32
    assert (theirs.gradient_accumulation_steps, theirs.train_batch_size) == (4, 32)
    assert theirs.zero_allow_untested_optimizer and not theirs.zero_force_ds_cpu_optimizer
    assert not zero.memory_efficient_linear
    if stage == 3:
        assert (zero.param_persistence_threshold, zero.prefetch_bucket_size) == (0, 50_000_000)
    places = [getattr(block, "device", "none") for block in (zero.offload_optimizer, zero.offload_param)]
    assert places == ["none" if offload == "none" else "cpu", "cpu" if offload == "parameters" else "none"]


@pytest.mark.parametrize("name", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"])
def test_schedulers_keep_the_rates_of_both_groups(json_file, name):
    from deepspeed.runtime import lr_schedules

    path = json_file({"scheduler": {"type": name, "params": {"warmup_type": "linear"}}})
    optim = {"lr": 0.25, "full_precision_lr": 0.5, "warmup_steps": 4}
    block = resolved(run(optim=optim, train={"steps": 9}, zero_config=path))["scheduler"]
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.25, 0.5)]
    optimizer = torch.optim.AdamW(groups)
    scheduler = getattr(lr_schedules, name)(optimizer, **block["params"])
    rates = []
    for _ in range(6):
        rates.append([group["lr"] for group in optimizer.param_groups])
        scheduler.step()
    assert all(second == pytest.approx(2 * first) for first, second in rates)
    assert 0.22 < max(rates)[0] <= 0.25
