"""The DeepSpeed JSON that is refused: which keys and values, and in which words."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loqt_scale.config import RunConfig
from loqt_scale.strategies.zero.json import nested
from loqt_scale.strategies.zero.keys import RULES
from tests.unit.strategies.zero_files import refusal, resolved, run

pytest.importorskip("deepspeed")

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
        ({"zero_optimization.overlap_comm": "perhaps"}, "DeepSpeedZeroConfig, overlap_comm: Input should be a valid"),
        ({"zero_optimization.overlap_com": True}, "DeepSpeedZeroConfig, overlap_com: Extra inputs are not permitted"),
        ({"zero_optimization.reduce_bucket_size": 0}, "DeepSpeedZeroConfig, reduce_bucket_size: Input should be great"),
        ({"zero_optimization.allgather_bucket_size": 7}, "zero_optimization.allgather_bucket_size must be an even"),
        ({"communication_data_type": "fp8"}, "Invalid communication_data_type"),
        ({"data_types.buffer_dtype": "fp9"}, "'fp9' is not a valid DtypeEnum"),
        ({"bf16.enable": True}, "DeepSpeedBF16Config, enable: Extra inputs"),
        ({"amp.enabled": True}, "NVIDIA Apex AMP integration has been removed"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": [0.1]}}}, "expected 2 value for min_lr, got 1"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 9}}},
            "TypeError: WarmupLR.__init__() got an u",
        ),
    ],
)
def test_what_deepspeed_refuses_is_said_early_in_its_words(json_file, values, expected):
    path = json_file(nested({"steps_per_print": 10, "aio.queue_depth": 8, **values}))
    assert refusal(run(zero_config=path)).startswith(f"{path}: DeepSpeed refuses these settings: {expected}")


def test_a_key_that_deepspeed_would_pass_over_is_refused(json_file):
    path = json_file({"gradient_cliping": 1.0})
    said = "DeepSpeed has no key 'gradient_cliping' at the top of its settings; did you mean 'gradient_clipping'?"
    assert refusal(run(zero_config=path)) == f"{path}: {said}"
    assert refusal(run(zero_config=json_file({"zzz": {"enabled": True}}))).endswith("settings; leave it out")


# ---- the file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"zero_optimization": True}, 'zero_optimization is true; write an object such as {"stage": ...}'),
        ({"bf16": "bf16"}, 'bf16 is "bf16"; write an object such as {"enabled": ...}'),
        ([1], "it holds [1]; write an object such as {...}"),
        ("{\n  'a': 1}", "it is not JSON: line 2, column 3: Expecting property name enclosed in double quotes"),
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
