"""The planner against what is really there: bytes of every kind, highest moments, bytes on the wire."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loqt_scale.cli import main
from loqt_scale.config.commands import PlanOptions
from loqt_scale.config.sizes import parse_size
from loqt_scale.config.yaml import parse_run_config
from loqt_scale.errors import ConfigError
from loqt_scale.model.build import design_model
from loqt_scale.plan import Plan, activations, describe_plan, plan_run
from loqt_scale.plan.advice import changes
from loqt_scale.plan.shapes import model_shapes
from loqt_scale.strategies import DTYPES
from tests.distributed.pool import RankPool
from tests.distributed.tasks import small_config
from tests.distributed.test_footprint import WIDE, Run, run_on

KINDS = {
    "codes": "codes of W",
    "scales": "scales of W",
    "projection": "P",
    "factor": "B",
    "full_precision": "other parameters",
    "adam": "moments",
}
BYTES = 320  # the byte tokenizer's vocabulary
LEAN = {
    "optim.states": "int8",
    "model.dtype": "bfloat16",
    "model.trained_dtype": "bfloat16",
    "loqt.quantization.weight": "nf4_double",
    "loqt.rank": 32,
}
PER_LAYER = {"optim.per_layer": True, "optim.clip_norm": 0.0, "train.micro_batch_size": 6}
CASES = [
    (1, "single", {}),
    (1, "single", {**LEAN, **PER_LAYER}),
    (1, "single", {"model.activation_checkpointing": True, "train.micro_batch_size": 6}),
    (1, "single", {"method": "full"}),
    (2, "ddp", {}),
    (2, "fsdp", {}),
    (3, "fsdp", LEAN),
    (2, "fsdp", {"optim.name": "muon"}),
]
IDS = ["single", "lean", "checkpointed", "full", "ddp", "fsdp", "fsdp-lean", "fsdp-muon"]


@pytest.fixture
def run(ranks: RankPool, tmp_path: Path, text_file: Path, cache_dir: Path) -> Run:
    return run_on(ranks, tmp_path, text_file, cache_dir)


def planned(world_size: int, strategy: str, settings: dict[str, Any]) -> Plan:
    config = small_config({**WIDE, "parallel.strategy": strategy, **settings})
    return plan_run(config, ranks=world_size, vocab_size=BYTES)


@pytest.mark.parametrize(
    ("world_size", "strategy", "settings"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.long] if name in ("checkpointed", "ddp", "fsdp") else [])
        for case, name in zip(CASES, IDS, strict=True)
    ],
)
def test_state_is_what_a_rank_holds(run: Run, world_size: int, strategy: str, settings: dict[str, Any]) -> None:
    """Of every kind, on the rank that holds most of it."""
    plan = planned(world_size, strategy, settings)
    held = [result["held"] for result in run("held_bytes", world_size, strategy, **settings)]
    for kind, name in KINDS.items():
        assert plan.memory.state[name] == pytest.approx(max(h.get(kind, 0) for h in held), rel=0.03), name
    assert plan.memory.gradients == pytest.approx(max(h["gradients"] for h in held), rel=0.03)


KEPT = [
    pytest.param(
        2,
        "fsdp",
        {"parallel.kept_between_passes": kept, "loqt.rank": 128, "train.micro_batch_size": 1},
        marks=[pytest.mark.long],
        id=f"{kept}-kept",
    )
    for kept in ("nothing", "trained")
]
# bfloat16 gradients of several passes wait as float32 sums
SUMMED = [
    pytest.param(
        world_size,
        strategy,
        {**LEAN, "loqt.rank": 128, "train.micro_batch_size": 1, **more},
        marks=pytest.mark.long,
        id=name,
    )
    for world_size, strategy, more, name in (
        (1, "single", {}, "single-summed"),
        (1, "single", {"parallel.offload": "optimizer"}, "offload-summed"),
        (2, "ddp", {}, "ddp-summed"),
        (2, "fsdp", {"parallel.kept_between_passes": "nothing"}, "fsdp-summed"),
    )
]
AWAY = [
    pytest.param(1, "single", {"parallel.offload": what}, id=what, marks=[] if what == "all" else [pytest.mark.long])
    for what in ("base", "optimizer", "all")
]


@pytest.mark.parametrize(
    ("world_size", "strategy", "settings"),
    [
        *(
            pytest.param(*case, id=name, marks=[pytest.mark.long] if name in ("ddp", "fsdp", "fsdp-muon") else [])
            for case, name in zip(CASES, IDS, strict=True)
        ),
        *KEPT,
        *AWAY,
        *SUMMED,
    ],
)
def test_peaks_are_the_highest_moments(run: Run, world_size: int, strategy: str, settings: dict[str, Any]) -> None:
    """FSDP2 may still hold the block before the one in use, or not: gloo's thread decides. The plan counts it.

    On a busy machine that thread may be so late that two are held; then it is measured again.
    """
    plan = planned(world_size, strategy, settings)
    block = gathered_block(world_size, settings) if strategy == "fsdp" else 0
    for _attempt in range(3):
        peaks = run("peak_bytes", world_size, strategy, **settings)
        print(plan.memory, plan.memory.step_peak, plan.memory.merge_peak, peaks, block)
        measured = {name: max(result.get(name, 0) for result in peaks) for name in ("step", "merge")}
        expected = {"step": plan.memory.step_peak, "merge": plan.memory.merge_peak}
        held = {name: peak + plan.memory.host for name, peak in expected.items()}  # the host's memory is ours too
        wrong = [n for n in held if not any(held[n] == pytest.approx(measured[n] + b, rel=0.10) for b in (0, block))]
        if not wrong or strategy != "fsdp":
            break
    assert not wrong, (held, measured)


def gathered_block(world_size: int, settings: dict[str, Any]) -> int:
    """Bytes of one block as FSDP2 gathers it."""
    config = small_config({**WIDE, **settings})
    shapes = model_shapes(design_model(config, vocab_size=BYTES))
    return sum(p.gathered_bytes(world_size, DTYPES[config.model.dtype]) for p in shapes.parameters if p.unit == 0)


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (2, {}),
        pytest.param(3, {"parallel.reshard_after_forward": False}, marks=pytest.mark.long),
        *(pytest.param(2, c.values[2], marks=c.marks) for c in KEPT),
    ],
)
def test_traffic_is_what_the_collectives_send(run: Run, world_size: int, settings: dict[str, Any]) -> None:
    """A step to the byte; a merge, whose rows need not divide, at most and nearly as much."""
    plan, seen = planned(world_size, "fsdp", settings), run("traffic", world_size, "fsdp", **settings)[0]
    assert plan.step.payload == sum(size for _, size, _ in seen["step"])
    assert plan.step.sent == pytest.approx(seen["step_sent"], rel=1e-3)
    merge = sum(size for _, size, _ in seen["merge"])
    assert 0.5 * plan.merge.payload < merge <= plan.merge.payload
    assert 0.5 * plan.merge.sent < seen["merge_sent"] <= plan.merge.sent


def test_replicas_send_little_to_each_other(run: Run) -> None:
    """HSDP on 2 x 2 ranks: what stays among the ranks of a replica, and what does not, is planned."""
    settings = {"parallel.shard_size": 2}
    plan, seen = planned(4, "fsdp", settings), run("traffic", 4, "fsdp", **settings)[0]
    assert plan.step.sent == pytest.approx(seen["step_sent"], rel=1e-3)
    assert plan.step.sent - plan.step.inside == pytest.approx(seen["step_between"], rel=1e-3)
    for planned_bytes, sent in (
        (plan.merge.sent, seen["merge_sent"]),
        (plan.merge.sent - plan.merge.inside, seen["merge_between"]),
    ):
        assert 0.5 * planned_bytes < sent <= planned_bytes
    assert plan.memory.state == planned(2, "fsdp", {}).memory.state


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_holds_and_sends_what_is_planned(tmp_path: Path, text_file: Path, cache_dir: Path, stage: int) -> None:
    """Three passes a step in bfloat16: state to 3 %, a step's bytes on the wire to the padding."""
    settings = {"parallel.zero_stage": stage, "model.dtype": "bfloat16", "train.micro_batch_size": 1}
    plan, pool = planned(2, "zero", settings), RankPool()  # of its own: DeepSpeed's groups outlive a task
    try:
        call = run_on(pool, tmp_path, text_file, cache_dir)
        ranks = call("held_bytes", 2, "zero", **settings)
        seen = call("traffic", 2, "zero", **settings)[0]
    finally:
        pool.close()
    held = {kind: max(rank["held"].get(kind, 0) for rank in ranks) for kind in (*KINDS, "masters")}
    for kind, name in (*KINDS.items(), ("masters", "float32 masters")):
        assert plan.memory.state[name] == pytest.approx(held[kind], rel=0.03), name
    assert plan.step.payload == pytest.approx(sum(size for _, size, _ in seen["step"]), abs=64)
    assert plan.step.sent == pytest.approx(seen["step_sent"], abs=64)
    assert 0.7 * plan.merge.sent < seen["merge_sent"] < 1.1 * plan.merge.sent  # rounds that gain little are left out


@pytest.mark.long
def test_ddp_sends_what_is_planned(run: Run) -> None:
    """A step to the byte; of a merge the new W, too."""
    plan, seen = planned(2, "ddp", {}), run("traffic", 2, "ddp")[0]
    assert plan.step.sent == pytest.approx(seen["step_sent"], rel=1e-3)
    assert 0.7 * plan.merge.sent < seen["merge_sent"] < 1.1 * plan.merge.sent  # rounds that gain little are left out


def test_a_large_vocabulary_costs_a_chunk_of_logits() -> None:
    """4,096 tokens of 131,072 logits: 2 GiB in float32, of which a chunk is 256 MiB."""
    peaks = []
    for chunk in (0, None):
        config = small_config(
            {"data.seq_len": 512, "train.micro_batch_size": 8, "train.global_batch_size": 8}
            | {"model.loss_chunk_tokens": chunk}
        )
        peaks.append(activations.OnePass(config, vocab_size=131_072).gradients_pile_up)
    assert peaks[0] > 4 * 2**30 and peaks[1] < 2**30


def test_documents_apart_take_no_mask() -> None:
    size = {"data.seq_len": 1024, "train.micro_batch_size": 4, "train.global_batch_size": 4}
    off, on = (
        activations.OnePass(small_config({**size, "data.mask_documents": mask}), vocab_size=BYTES).gradients_freed
        for mask in (False, True)
    )
    assert off <= on < off + 4 * 1024**2  # positions, and tables of their angles


@pytest.mark.long
@pytest.mark.parametrize("recompute", [False, True])
def test_two_shallow_models_stand_for_a_deep_one(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = {**WIDE["model.overrides"], "num_hidden_layers": 7}
    config = small_config({**WIDE, "model.overrides": overrides, "model.activation_checkpointing": recompute})
    peaks = []
    for depths in ((2, 4), (7, 8)):
        monkeypatch.setattr(activations, "DEPTHS", depths)
        monkeypatch.setattr(activations, "_KNOWN", {})
        memory = activations.OnePass(config, vocab_size=BYTES)
        peaks.append([memory.gradients_pile_up, memory.gradients_freed, memory.merge_freed])
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02)


def test_the_advice_makes_it_fit_and_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    """Run the words of the advice through the command line: it fits, with the peak that was promised."""
    words = ["--config", str(Path(__file__).parents[2] / "configs" / "llama_60m.yaml"), "--vocab-size", "32128"]
    words += ["--model.overrides", '{"num_hidden_layers": 1}']
    assert main(["plan", *words, "--gpus", "1", "--gpu-memory=1200MiB"]) == 0
    said = capsys.readouterr().out
    assert "does not fit" in said and "it fits (" in said
    peak = said.partition("it fits (")[2].partition(")")[0]
    advice = [word for word in said.partition(") with")[2].replace("\\", " ").split() if word.startswith("--")]
    assert main(["plan", *words, "--gpus", "1", "--gpu-memory=1200MiB", *advice]) == 0
    again = capsys.readouterr().out
    assert "fits: " in again and "does not fit" not in again
    assert f"{peak}" in again.partition("peak of a step")[2]


def test_changes_only_ever_save() -> None:
    overrides = {**WIDE["model.overrides"], "num_hidden_layers": 1}
    config = small_config({**WIDE, "model.overrides": overrides, "loqt.rank": 256, "train.micro_batch_size": 4})
    peaks = [plan_run(config, ranks=1, vocab_size=BYTES).memory.peak]
    for change in changes(config, ranks=1):
        peaks.append(plan_run(change.config, ranks=1, vocab_size=BYTES).memory.peak)
    assert len(peaks) >= 8 and peaks[-1] < 0.6 * peaks[0]


def test_what_cannot_be_planned_says_what_to_write() -> None:
    config = small_config(WIDE)
    for changed, ranks, message in (
        ({"strategy": "zero", "zero_offload": "optimizer"}, 2, "leave it out, and write parallel.zero_stage"),
        ({"strategy": "single"}, 2, "write --gpus 1"),
        ({"strategy": "fsdp", "shard_size": 4}, 6, "does not divide 6 rank.* write one of 2, 3, 6"),
    ):
        other = replace(config, parallel=replace(config.parallel, **changed))
        with pytest.raises(ConfigError, match=message):
            plan_run(other, ranks=ranks, vocab_size=BYTES)
    for text in ("24", "big GB", "GB"):
        with pytest.raises(ConfigError, match="write a number above 0 and a unit"):
            parse_size(text)
    assert (parse_size("24GB"), parse_size("1.5 GiB")) == (24 * 10**9, 3 * 2**29)
    with pytest.raises(ConfigError, match="gpus is 0; write 1 to "):
        PlanOptions(gpus=0)


def test_nothing_is_allocated() -> None:
    """13B in a process that could not hold it; and full-rank training sends more."""
    root = Path(__file__).parents[2]
    config = parse_run_config(["--config", str(root / "configs" / "llama_13b.yaml")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = describe_plan(config, ranks=8, vocab_size=32128)
    assert "a step, full-rank" in said and "peak of a merge step" in said
