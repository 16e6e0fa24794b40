"""DeepSpeed's configuration: what is filled in, what is refused and in which words, and DeepSpeed's own view of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loqt_scale.config import ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from loqt_scale.errors import ConfigError
from loqt_scale.strategies.zero.config import check_zero_unused, deepspeed_config, size_buckets
from loqt_scale.strategies.zero.rules import RULES, flattened, nested

deepspeed = pytest.importorskip("deepspeed")

SHIPPED = sorted((Path(__file__).resolve().parents[3] / "configs").glob("zero_*.json"))
NUMBERS = st.floats(1e-9, 1e9)
COUNTS = st.integers(1, 10**6)
# key of the JSON: our value, as `AGREEING` has it; the setting it must agree with; other values
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
    "scheduler.type": ("WarmupCosineLR", "optim.schedule", st.sampled_from(["WarmupLR", "OneCycle", "StepLR"])),
    "zero_optimization.stage": (2, "parallel.zero_stage", st.sampled_from([1, 3])),
    "zero_optimization.offload_optimizer.device": ("cpu", "parallel.zero_offload", st.just("none")),
    "zero_optimization.offload_param.device": ("none", "parallel.zero_offload", st.just("cpu")),
}


# the run of which `SHARED` speaks
AGREEING = {
    "dtype": "bfloat16",
    "optim": {"lr": 0.25, "betas": (0.5, 0.75), "eps": 1e-6, "weight_decay": 0.125, "clip_norm": 0.5},
    "train": {"global_batch_size": 24, "micro_batch_size": 3},
    **{"zero_stage": 2, "zero_offload": "optimizer", "zero_log_level": "warning"},
}
ALLOWED_BLOCKS = ("activation_checkpointing", "checkpoint", "datastates_ckpt")  # what is false in them


def run(*, dtype="float32", optim=None, train=None, **parallel) -> RunConfig:
    """A run whose batch of 32 makes 2 micro-steps of 8 on each of 2 ranks."""
    return RunConfig(
        model=ModelConfig(dtype=dtype),
        optim=OptimConfig(**(optim or {})),
        parallel=ParallelConfig(strategy="zero", **parallel),
        train=TrainConfig(**(train or {})),
    )


def resolved(config: RunConfig) -> dict:
    return deepspeed_config(config, world_size=2)


def refusal(config: RunConfig) -> str:
    """The message of a refused run: one line, which begins with the file."""
    with pytest.raises(ConfigError) as caught:
        resolved(config)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{config.parallel.zero_config}: ")


# ---- what is filled in -------------------------------------------------------------------------------------------


def test_without_a_file_everything_is_ours():
    values = resolved(run(dtype="bfloat16", optim={"clip_norm": 0.0}, zero_log_level="info"))
    size_buckets(values, 1001)
    assert values == {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "log_level": "info",
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 1001,
            "allgather_bucket_size": 1002,
            "memory_efficient_linear": False,
            "stage3_param_persistence_threshold": 0,
        },
    }


@pytest.mark.parametrize(("trained", "sizes"), [(0, (1, 2)), (1001, (1001, 1002)), (10**10, (20_000_000,) * 2)])
def test_buckets_are_no_larger_than_the_model(trained, sizes):
    settings = {"zero_optimization": {}}
    size_buckets(settings, trained)
    assert tuple(settings["zero_optimization"].values()) == sizes


@pytest.mark.parametrize("offload", ["none", "optimizer", "parameters"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_fit_any_run_and_deepspeed_understands_them(path, dtype, offload):
    stage = int(path.stem[-1])
    if stage < 3 and offload == "parameters":
        return
    settings = {"dtype": dtype, "zero_offload": offload, "train": {"global_batch_size": 7, "micro_batch_size": 2}}
    ours, values = resolved(run(zero_stage=stage, **settings)), resolved(run(zero_config=str(path), **settings))
    theirs = deepspeed.DeepSpeedConfig(values)
    zero = theirs.zero_config
    assert (zero.stage, zero.param_persistence_threshold, theirs.gradient_accumulation_steps) == (stage, 0, 2)
    assert theirs.communication_data_type == torch.float32
    assert theirs.grad_accum_dtype == ("bf16" if (stage, dtype, offload) == (1, "bfloat16", "none") else "fp32")
    assert theirs.bfloat16_config.enabled == (dtype == "bfloat16") and not theirs.float16_config.enabled
    places = [getattr(block, "device", "none") for block in (zero.offload_optimizer, zero.offload_param)]
    assert places == ["none" if offload == "none" else "cpu", "cpu" if offload == "parameters" else "none"]
    blocks = {"offload_optimizer", "offload_param"}  # "pin_memory" is the file's
    filled = {key: value for key, value in ours.pop("zero_optimization").items() if key not in blocks}
    assert values.pop("zero_optimization").items() >= filled.items()
    assert values == ours


def test_what_is_not_ours_is_passed_on(json_file):
    """Blocks that DeepSpeed reads key by key, blocks that pydantic reads, and "auto" and null that are left out."""
    tree = {
        "wall_clock_breakdown": True,
        "communication_data_type": "bf16",
        "flops_profiler": {"enabled": True, "output_file": None},
        "aio": {"block_size": "auto", "queue_depth": 8},
        "activation_checkpointing": {"partition_activations": False},
        "scheduler": {"type": "auto", "params": {"warmup_num_steps": "auto"}},
        "zero_optimization": {
            "stage": 1.0,
            "reduce_bucket_size": 2e5,
            "param_persistence_threshold": 7,
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
            "cpu_offload_param": False,
        },
    }
    values = resolved(run(zero_config=json_file("\ufeff" + json.dumps(tree))))  # a byte order mark is no error
    assert deepspeed.DeepSpeedConfig(values).zero_config.param_persistence_threshold == 7
    assert "scheduler" not in values
    size_buckets(values, 1000)
    assert flattened(values).items() >= flattened(tree).items()


# ---- what both sides name ----------------------------------------------------------------------------------------


@given(forms=st.fixed_dictionaries({key: st.sampled_from(["missing", "auto", None, "ours"]) for key in SHARED}))
def test_auto_is_missing_is_ours(json_file, forms):
    written = {key: SHARED[key][0] if form == "ours" else form for key, form in forms.items() if form != "missing"}
    values = resolved(run(**AGREEING, zero_config=json_file(nested(written))))
    values["zero_optimization"].pop("offload_param", None)  # may be there, saying what is so
    assert values == resolved(run(**AGREEING))
    assert not {"optimizer", "scheduler", "train_batch_size"} & values.keys()


@pytest.mark.parametrize("key", SHARED)
def test_any_other_value_is_refused_with_both(json_file, key):
    ours, setting, others = SHARED[key]

    @given(value=others.filter(lambda value: value != ours))
    def refused(value):
        message = refusal(run(**AGREEING, zero_config=json_file(nested({key: value}))))
        assert message.startswith(f"{key} is {json.dumps(value)[:25]}") and setting in message
        assert f"; write {json.dumps(ours)}" in message and message.endswith(f", or leave it out, or change {setting}")

    refused()


@pytest.mark.parametrize(
    ("key", "value", "settings", "expected"),
    [
        (
            "gradient_accumulation_steps",
            4,
            {},
            "gradient_accumulation_steps is 4, but 32 sequences (train.global_batch_size) on 2 rank(s) make 2 passes; "
            "write 2, or leave it out, or change train.micro_batch_size",
        ),
        ("scheduler.type", "WarmupLR", {"optim": {"schedule": "wsd"}}, "is wsd; leave it out, or change optim.sched"),
        ("optimizer.type", "AdamW", {"optim": {"name": "muon"}}, "is muon; leave it out, or change optim.name"),
        ("data_types.grad_accum_dtype", "bf16", {}, 'is "bf16", but gradients add up in float32; at'),
        ("data_types.grad_accum_dtype", "fp32", {"dtype": "bfloat16", "zero_stage": 1}, 'does it; write "bf16", or'),
        ("scheduler.params.warmup_num_steps", 9, {}, "is 9, but the optimizer and its rates are those of optim.name"),
        ("pipeline.stages", 2, {}, "pipeline.stages is 2, but the model is not cut into pipeline stages here"),
        ("checkpoint.parallel_write.stage", True, {}, "is true, but checkpoints are this package's own (checkpoint.*)"),
        ("zero_optimization.offload_param.device", "cpu", {"zero_stage": 1}, "are offloaded (parallel.zero_offload"),
        ("steps_per_print", 1, {"zero_stage": 2, "zero_offload": "parameters"}, "but stage 2 keeps all of them on"),
    ],
)
def test_what_follows_from_several_settings(json_file, key, value, settings, expected):
    assert expected in refusal(run(zero_config=json_file(nested({key: value})), **settings))


@pytest.mark.parametrize("given", [{"zero_config": "x.json"}, {"zero_stage": 2}, {"zero_offload": "optimizer"}])
def test_settings_of_zero_belong_to_zero(given):
    (name, value), *_ = given.items()
    both = f"^parallel.{name} is {value!r}, but parallel.strategy is 'ddp'; write parallel.strategy: zero, or leave"
    with pytest.raises(ConfigError, match=both):
        check_zero_unused(ParallelConfig(strategy="ddp", **given))
    check_zero_unused(ParallelConfig(strategy="ddp", zero_offload="none"))


# ---- what would break a run, what DeepSpeed refuses, and files that are none -------------------------------------


@pytest.mark.parametrize("key", RULES)
def test_what_would_break_a_run_is_refused_with_the_reason(json_file, key):
    rule = RULES[key]
    wrong = not rule.allowed[0] if rule.allowed and isinstance(rule.allowed[0], bool) else 7
    wanted = f"write {' or '.join(map(json.dumps, rule.allowed))}, or " if rule.allowed else ""
    said = refusal(run(zero_config=json_file(nested({key: wrong}))))
    assert said == f"{key} is {json.dumps(wrong)}, but {rule.why}; {wanted}leave it out"
    for harmless in ("auto", None, *(rule.allowed[:1] if key not in ALLOWED_BLOCKS else ())):
        resolved(run(zero_config=json_file(nested({key: harmless}))))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"zero_optimization": {"overlap_com": 1}}, "DeepSpeedZeroConfig, 'overlap_com': Extra inputs are not"),
        ({"zero_optimization": {"allgather_bucket_size": 7}}, "allgather_bucket_size must be an even number"),
        ({"communication_data_type": "fp8"}, "DeepSpeed refuses these settings: Invalid communication_data_type"),
        ({"gradient_cliping": 1.0}, "'gradient_cliping' at the top of its settings; did you mean 'gradient_clipping'?"),
        ({"zzz": {"enabled": True}}, "DeepSpeed has no key 'zzz' at the top of its settings; leave it out"),
        ({"zero_optimization": True}, 'zero_optimization is true; write an object such as {"'),
        ({"scheduler": 1}, "scheduler is 1, but the optimizer and its rates are those of"),
        ([1], "it holds [1]; write an object such as {...}"),
        ("{'a': 1}", "which cannot be read: Expecting property name enclosed in double quotes"),
        ('{"a": {"b": true, "b": false}}', "which cannot be read: Duplicate keys"),
        (b'{"a": "\xe9"}', "which cannot be read: 'utf-8' codec"),
        (None, "which cannot be read: No such file"),
    ],
)
def test_files_that_are_no_settings_of_deepspeeds(json_file, tmp_path, content, expected):
    path = tmp_path / "x.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path = json_file(content)
    assert expected in refusal(run(zero_config=str(path)))
