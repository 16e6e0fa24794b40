"""The DeepSpeed JSON that is refused: which keys and values, and in which words."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loqt_scale.config import ParallelConfig, RunConfig
from loqt_scale.errors import ConfigError
from loqt_scale.strategies.zero.config import check_zero_unused
from loqt_scale.strategies.zero.rules import RULES, nested
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
    "optimizer.type": ("AdamW", "optim.name", st.sampled_from(["OneBitAdam", "Lamb", "Muon"])),
    "optimizer.params.lr": (0.25, "optim.lr", NUMBERS),
    "optimizer.params.betas": ([0.5, 0.75], "optim.betas", st.lists(st.floats(0.0, 1.0), max_size=3)),
    "optimizer.params.eps": (1e-6, "optim.eps", NUMBERS),
    "optimizer.params.weight_decay": (0.125, "optim.weight_decay", NUMBERS),
    "scheduler.type": ("WarmupDecayLR", "optim.schedule", st.sampled_from(["WarmupLR", "OneCycle", "StepLR"])),
    "zero_optimization.stage": (2, "parallel.zero_stage", st.sampled_from([1, 3])),
    "zero_optimization.offload_optimizer.device": ("cpu", "parallel.zero_offload", st.just("none")),
    "zero_optimization.offload_param.device": ("none", "parallel.zero_offload", st.just("cpu")),
}


def shared_run(path: str | None) -> RunConfig:
    adam = {"lr": 0.25, "betas": (0.5, 0.75), "eps": 1e-6, "weight_decay": 0.125}
    optim = {**adam, "schedule": "linear", "clip_norm": 0.5}
    train = {"global_batch_size": 24, "micro_batch_size": 3}
    ours = {"zero_stage": 2, "zero_offload": "optimizer", "zero_log_level": "warning"}
    return run(dtype="bfloat16", optim=optim, train=train, zero_config=path, **ours)


@given(forms=st.fixed_dictionaries({key: st.sampled_from(["missing", "auto", "null", "ours"]) for key in SHARED}))
def test_auto_is_missing_is_ours(json_file, forms):
    written = {"auto": "auto", "null": None}
    given_here = {key: written.get(form, SHARED[key][0]) for key, form in forms.items() if form != "missing"}
    values = resolved(shared_run(json_file(nested(given_here))))
    values["zero_optimization"].pop("offload_param", None)  # may be there, saying what is so
    assert values == resolved(shared_run(None))
    assert not {"optimizer", "scheduler", "train_batch_size"} & values.keys()


@pytest.mark.parametrize("key", SHARED)
def test_any_other_value_is_refused_with_both(json_file, key):
    ours, setting, others = SHARED[key]

    @given(value=others.filter(lambda value: value != ours))
    def refused(value):
        path = json_file(nested({key: value}))
        message = refusal(shared_run(path))
        assert message.startswith(f"{path}: {key} is {json.dumps(value)[:50]}")
        assert f"; write {json.dumps(ours)}" in message
        assert message.endswith(f", or leave it out, or change {setting}")

    refused()


NO_SUCH = "but the optimizer and its rates are those of optim.lr, optim.schedule, optim.warmup_steps ...; leave it out"
OFFLOADED = "zero_optimization.offload_param.device"
# what the file says, what our settings say: the message
CONTRADICTIONS = [
    (
        {"gradient_accumulation_steps": 4},
        {},
        "gradient_accumulation_steps is 4, but 32 sequences (train.global_batch_size) on 2 rank(s) make 2 passes; "
        "write 2, or leave it out, or change train.micro_batch_size",
    ),
    (
        {"scheduler.type": "WarmupLR"},
        {},
        'scheduler.type is "WarmupLR", but optim.schedule is cosine (WarmupCosineLR is cosine, WarmupDecayLR is '
        'linear, WarmupLR is constant); write "WarmupCosineLR", or leave it out, or change optim.schedule',
    ),
    (
        {"optimizer.type": "AdamW"},
        {"optim": {"name": "muon"}},
        'optimizer.type is "AdamW", but optim.name is "muon"; leave it out, or change optim.name',
    ),
    (
        {OFFLOADED: "cpu"},
        {"zero_stage": 1},
        f"parameters are offloaded (parallel.zero_offload: parameters, or {OFFLOADED}), but stage 1 keeps all of them "
        "on every rank; write parallel.zero_stage: 3, or parallel.zero_offload: optimizer",
    ),
    (
        {"data_types.grad_accum_dtype": "bf16"},
        {},
        'data_types.grad_accum_dtype is "bf16", but gradients add up in float32; write "fp32", or leave it out',
    ),
    (
        {"data_types.grad_accum_dtype": "fp32"},
        {"dtype": "bfloat16", "zero_stage": 1},
        'data_types.grad_accum_dtype is "fp32", but at stage 1 in bfloat16 DeepSpeed takes another optimizer for it, '
        'which merges do not know; write "bf16", or leave it out, or change parallel.zero_stage',
    ),
    (
        {"data_types.param_dtype": "bf16"},
        {},
        'data_types.param_dtype is "bf16", but dtypes follow model.dtype, and gradients add up in float32 where '
        "DeepSpeed can; leave it out",
    ),
    ({"scheduler.params.warmup_num_steps": 9}, {}, f"scheduler.params.warmup_num_steps is 9, {NO_SUCH}"),
    ({"optimizer.params.momentum": 0.9}, {}, f"optimizer.params.momentum is 0.9, {NO_SUCH}"),
]


@pytest.mark.parametrize(("values", "settings", "expected"), CONTRADICTIONS)
def test_contradictions(json_file, values, settings, expected):
    path = json_file(nested(values))
    assert refusal(run(zero_config=path, **settings)) == f"{path}: {expected}"


def test_no_scheduler_of_deepspeeds_is_a_schedule_that_it_does_not_have(json_file):
    path = json_file(nested({"scheduler.type": "WarmupCosineLR"}))
    said = refusal(run(zero_config=path, optim={"schedule": "wsd"}))
    assert "optim.schedule is wsd" in said and said.endswith("; leave it out, or change optim.schedule")


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


# ---- what would break a run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.key)
def test_what_would_break_a_run_is_refused_with_the_reason(json_file, rule):
    wrong = not rule.allowed[0] if rule.allowed and isinstance(rule.allowed[0], bool) else 7
    remedy = "leave it out"
    if rule.allowed:
        remedy = f"write {' or '.join(map(json.dumps, rule.allowed))}, or leave it out"
    path = json_file(nested({rule.key: wrong}))
    assert refusal(run(zero_config=path)) == f"{path}: {rule.key} is {json.dumps(wrong)}, but {rule.why}; {remedy}"
    for harmless in (*rule.allowed[:1], "auto", None):
        resolved(run(zero_config=json_file(nested({rule.key: harmless}))))


@pytest.mark.parametrize("key", ["data_types.buffer_dtype", "pipeline.stages", "checkpoint.tag_validation"])
def test_a_block_that_is_refused_is_refused_for_each_of_its_keys(json_file, key):
    assert f": {key} is 7, but " in refusal(run(zero_config=json_file(nested({key: 7}))))


# ---- what DeepSpeed refuses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"zero_optimization.overlap_comm": "perhaps"}, "DeepSpeedZeroConfig, overlap_comm: Input should be a valid"),
        ({"zero_optimization.overlap_com": True}, "DeepSpeedZeroConfig, overlap_com: Extra inputs are not permitted"),
        ({"zero_optimization.allgather_bucket_size": 7}, "zero_optimization.allgather_bucket_size must be an even"),
        ({"communication_data_type": "fp8"}, "Invalid communication_data_type"),
        ({"bf16.enable": True}, "DeepSpeedBF16Config, enable: Extra inputs"),
        ({"amp.enabled": True}, "NVIDIA Apex AMP integration has been removed"),
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
        ({"zero_optimization": True}, '{}: zero_optimization is true; write an object such as {{"stage": ...}}'),
        ({"bf16": "bf16"}, '{}: bf16 is "bf16"; write an object such as {{"enabled": ...}}'),
        ({"scheduler": 1}, "{}: scheduler is 1, but the optimizer and its rates are those of"),
        ([1], "{}: it holds [1]; write an object such as {{...}}"),
        ("{\n  'a': 1}", "parallel.zero_config is '{}', which cannot be read: Expecting property name enclosed in do"),
        ('{"a": {"b": true, "b": false}}', "parallel.zero_config is '{}', which cannot be read: Duplicate keys"),
        ("", "parallel.zero_config is '{}', which cannot be read: Expecting value: line 1 column 1"),
    ],
)
def test_messages_about_the_file(json_file, tree, expected):
    path = json_file(tree)
    assert refusal(run(zero_config=path)).startswith(expected.format(path))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    for path in (tmp_path, tmp_path / "latin.json", tmp_path / "absent.json"):
        assert refusal(run(zero_config=str(path))).startswith(f"parallel.zero_config is '{path}', which cannot be read")


def test_a_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "mark.json"
    path.write_bytes(b"\xef\xbb\xbf{}")
    assert resolved(run(zero_config=str(path))) == resolved(run())
