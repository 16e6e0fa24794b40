"""Checkpoints of one strategy and world size, gone on from by another: the numbers stay those of the unbroken run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loqt_scale.training.runlock import RunLock
from tests.distributed.pool import RankFailed, RankPool
from tests.distributed.runs import AT, SavedRuns
from tests.distributed.tasks import STEPS
from tests.distributed.test_equivalence import ODD
from tests.unit.checkpoint.forging import edit_tensors

MERGE = 13  # right after a merge


@pytest.mark.parametrize(
    ("world_size", "strategy"),
    [
        (1, "single"),
        pytest.param(1, "single-all", marks=pytest.mark.long),
        pytest.param(2, "ddp", marks=pytest.mark.long),
        (2, "fsdp"),
        pytest.param(3, "fsdp", marks=pytest.mark.long),
        pytest.param(2, "zero-1", marks=pytest.mark.long),
        pytest.param(2, "zero-2", marks=pytest.mark.long),
        (2, "zero-3"),
    ],
)
def test_on_the_same_ranks_every_bit_is_the_same(
    saved: SavedRuns, tmp_path: Path, world_size: int, strategy: str
) -> None:
    unbroken = saved.losses(world_size, strategy)
    resumed = saved.run(world_size, strategy, tmp_path, **{"checkpoint.resume": saved.checkpoint(world_size, strategy)})
    assert resumed == {step: loss for step, loss in unbroken.items() if step > AT} and len(resumed) == STEPS - AT


QUICK = [
    ((1, "single"), (2, "fsdp")),
    ((2, "fsdp"), (1, "single")),
    ((2, "fsdp"), (3, "fsdp")),
    ((2, "fsdp"), (2, "zero-3")),
    ((2, "zero-3"), (1, "single")),
]
LONG = [
    ((1, "single"), (3, "ddp")),
    ((3, "fsdp"), (2, "ddp")),
    ((2, "ddp"), (3, "fsdp")),
    ((3, "fsdp"), (1, "single")),
    ((2, "zero-2"), (3, "zero-3")),
    ((2, "zero-1"), (2, "fsdp")),
]
MATRIX = [*QUICK, *(pytest.param(*pair, marks=pytest.mark.long) for pair in LONG)]


@pytest.mark.parametrize(("before", "after"), MATRIX, ids=lambda pair: f"{pair[1]}x{pair[0]}")
def test_on_other_ranks_and_strategies(
    saved: SavedRuns, tmp_path: Path, before: tuple[int, str], after: tuple[int, str]
) -> None:
    """Rows do not divide (86 of them, row groups of two): shards move. Tolerances are the equivalence tests'."""
    unbroken = saved.losses(*before)
    resumed = saved.run(*after, tmp_path, **{"checkpoint.resume": saved.checkpoint(*before)})
    assert len(resumed) == STEPS - AT
    next_merge = 2 * MERGE + 1
    assert all(
        loss == pytest.approx(unbroken[step], abs=1e-4 if step <= next_merge else 5e-2)
        for step, loss in resumed.items()
    )
    assert resumed[AT + 1] == pytest.approx(unbroken[AT + 1], abs=1e-5)


@pytest.mark.long
def test_bf16_masters_survive(saved: SavedRuns, tmp_path: Path) -> None:
    """What is saved is the float32 master, not its 16-bit copy: the same bits afterwards."""
    bf16 = {"model.dtype": "bfloat16", "checkpoint.every": AT, "checkpoint.keep_last": 9}
    unbroken = saved.run(2, "zero-3", tmp_path / "a", **bf16)
    checkpoint = tmp_path / "a" / "checkpoints" / f"step-{AT:08d}"
    resumed = saved.run(2, "zero-3", tmp_path / "b", **bf16, **{"checkpoint.resume": str(checkpoint)})
    assert resumed == {step: loss for step, loss in unbroken.items() if step > AT}


@pytest.mark.parametrize(("world_size", "strategy"), [pytest.param(1, "single", marks=pytest.mark.long), (2, "fsdp")])
def test_int8_states_and_bf16_parameters_survive(
    saved: SavedRuns, tmp_path: Path, world_size: int, strategy: str
) -> None:
    """Saved as float32, from which the same codes come; and rounding at random goes on with the same noise."""
    small = {"optim.states": "int8", "model.dtype": "bfloat16", "model.trained_dtype": "bfloat16", "loqt.rank": 32}
    small |= {"checkpoint.every": AT, "checkpoint.keep_last": 9}
    unbroken = saved.run(world_size, strategy, tmp_path / "a", **small)
    checkpoint = tmp_path / "a" / "checkpoints" / f"step-{AT:08d}"
    resumed = saved.run(world_size, strategy, tmp_path / "b", **small, **{"checkpoint.resume": str(checkpoint)})
    assert resumed == {step: loss for step, loss in unbroken.items() if step > AT}


PACKED = {"optim.states": "int8", "loqt.rank": 32, "model.overrides": ODD, "checkpoint.every": 8, "train.steps": 14}


@pytest.mark.parametrize(
    "strategy", ["zero-2", *(pytest.param(s, marks=pytest.mark.long) for s in ("zero-1", "zero-3"))]
)
def test_int8_states_survive_under_zero(saved: SavedRuns, tmp_path: Path, strategy: str) -> None:
    """Bit for bit on the same ranks, which cut blocks; one process goes on from there within rounding."""
    unbroken = saved.run(2, strategy, tmp_path / "a", **PACKED)
    after = {step: loss for step, loss in unbroken.items() if step > 8}
    resume = {"checkpoint.resume": str(tmp_path / "a" / "checkpoints" / "step-00000008")}
    assert saved.run(2, strategy, tmp_path / "b", **PACKED, **resume) == after and len(after) == 6
    assert saved.run(1, "single", tmp_path / "c", **PACKED, **resume) == pytest.approx(after, abs=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["zero-1", "zero-2", "zero-3"])
def test_int8_states_move_to_zero(saved: SavedRuns, tmp_path: Path, strategy: str) -> None:
    unbroken = saved.run(1, "single", tmp_path / "a", **PACKED)
    after = {step: loss for step, loss in unbroken.items() if step > 8}
    resume = {"checkpoint.resume": str(tmp_path / "a" / "checkpoints" / "step-00000008")}
    assert saved.run(2, strategy, tmp_path / "b", **PACKED, **resume) == pytest.approx(after, abs=1e-4)


def test_replicas_of_shards(saved: SavedRuns, tmp_path: Path) -> None:
    """HSDP on 2 x 2 ranks goes on to the last bit, and on one process: the copies are one in the folder."""
    settings = {"parallel.shard_size": 2, "train.steps": 16, "checkpoint.every": 8, "checkpoint.keep_last": 9}
    unbroken = saved.run(4, "fsdp", tmp_path / "a", **settings)
    after = {step: loss for step, loss in unbroken.items() if step > 8}
    resume = {"checkpoint.resume": str(tmp_path / "a" / "checkpoints" / "step-00000008")}
    assert saved.run(4, "fsdp", tmp_path / "b", **settings, **resume) == after
    alone = saved.run(1, "single", tmp_path / "c", **{"train.steps": 16}, **resume)
    assert alone == pytest.approx(after, abs=1e-4)


@pytest.mark.parametrize("step", [MERGE - 1, MERGE, MERGE + 1])
def test_before_and_after_a_merge(saved: SavedRuns, tmp_path: Path, step: int) -> None:
    """The merge follows the update of step 13 (counted from 0), which is the 14th."""
    settings = {"checkpoint.every": step + 1, "checkpoint.keep_last": 99}
    unbroken = saved.run(1, "single", tmp_path / "a", **settings)
    checkpoint = tmp_path / "a" / "checkpoints" / f"step-{step + 1:08d}"
    resumed = saved.run(1, "single", tmp_path / "b", **{"checkpoint.resume": str(checkpoint)})
    assert resumed == {done: loss for done, loss in unbroken.items() if done > step + 1}


def test_auto_goes_on_in_the_same_folder(saved: SavedRuns, tmp_path: Path) -> None:
    """A folder whose later half is lost: `auto` repeats it, and metrics.jsonl holds every step once."""
    settings = {"checkpoint.every": 10, "checkpoint.keep_last": 9}
    unbroken = saved.run(1, "single", tmp_path, **settings)
    checkpoints = tmp_path / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == [f"step-{n:08d}" for n in (10, 20, STEPS)]
    (checkpoints / "latest").write_text("step-00000010\n")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {STEPS + 1}, "train/lo')  # killed while it wrote
    again = saved.run(1, "single", tmp_path, **settings)
    assert again == unbroken
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps.count(11) == 1 and steps == sorted(steps)
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}.old*"))


def test_ranks_find_the_same_in_their_folder(saved: SavedRuns, tmp_path: Path) -> None:
    """In use, finished, to go back: rank 0 decides, all of them do it."""
    run_dir = tmp_path / "run"
    job = {"train.steps": 6, "checkpoint.every": 2, "checkpoint.keep_last": 9}
    first = saved.run(2, "fsdp", run_dir, **job)
    with RunLock(run_dir), pytest.raises(RankFailed, match=r"rank [01]:[\s\S]*is in use by another job \(process"):
        saved.run(2, "fsdp", run_dir, **job)
    rows = (run_dir / "metrics.jsonl").read_text()
    assert saved.run(2, "fsdp", run_dir, **job) == first and (run_dir / "metrics.jsonl").read_text() == rows
    path = run_dir / "checkpoints" / "step-00000002"
    assert saved.run(2, "fsdp", run_dir, **job, **{"checkpoint.resume": str(path)}) == first
    assert sorted(path.name for path in run_dir.rglob("step-*")).count("step-00000006") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_changed_settings_are_named(saved: SavedRuns, tmp_path: Path) -> None:
    checkpoint = saved.checkpoint(1, "single")
    changed = {"optim.lr": 1e-3, "loqt.rank": 4, "checkpoint.resume": checkpoint}
    with pytest.raises(RankFailed, match=r"loqt\.rank was 8, is 4; optim\.lr was 0\.005, is 0\.001\. Write the old"):
        saved.run(1, "single", tmp_path, **changed)


@pytest.mark.parametrize(("world_size", "strategy"), [pytest.param(1, "single", marks=pytest.mark.long), (2, "fsdp")])
def test_in_the_background_the_same_tensors_are_written(
    saved: SavedRuns, tmp_path: Path, world_size: int, strategy: str
) -> None:
    """Training goes on over the memory that is being saved, and a save still holds the step it was asked for."""
    saves = []
    for background in (True, False):
        run_dir = tmp_path / str(background)
        settings = {"checkpoint.background": background, "checkpoint.every": 3, "checkpoint.keep_last": 9}
        saved.run(world_size, strategy, run_dir, **settings, **{"train.steps": 14})
        files = sorted(run_dir.glob("checkpoints/step-*/shard-*"))
        assert len(files) == 5 * world_size
        saves.append([hash_of_tensors(path) for path in files])
    assert saves[0] == saves[1] and len(set(saves[0])) == len(saves[0])


def hash_of_tensors(path: Path) -> str:
    tensors = load_file(path)
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()


def test_dropout_is_repeated(saved: SavedRuns, tmp_path: Path) -> None:
    """Random numbers of a step are a function of the step, so none are saved."""
    overrides = {"num_attention_heads": 4, "attention_dropout": 0.3}
    settings = {"model.overrides": overrides, "train.steps": 20, "checkpoint.every": 8, "checkpoint.keep_last": 9}
    unbroken = saved.run(1, "single", tmp_path / "a", **settings)
    checkpoint = tmp_path / "a" / "checkpoints" / "step-00000008"
    resumed = saved.run(1, "single", tmp_path / "b", **settings, **{"checkpoint.resume": str(checkpoint)})
    assert resumed == {step: loss for step, loss in unbroken.items() if step > 8}
    settings["model.overrides"] = {**overrides, "attention_dropout": 0.0}
    assert saved.run(1, "single", tmp_path / "c", **settings)[1] != unbroken[1]


def test_a_streamed_data_set_goes_on_where_it_was(saved: SavedRuns, tmp_path: Path, text_file: Path) -> None:
    documents = text_file.read_text(encoding="utf-8").split("\n\n")
    (tmp_path / "set").mkdir()
    for split, texts in (("train", documents[2:]), ("validation", documents[:2])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / "set" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    settings = {"data.files": [], "data.dataset": str(tmp_path / "set"), "train.steps": 16}
    saves = {"checkpoint.every": 7, "checkpoint.keep_last": 9}
    unbroken = saved.run(1, "single", tmp_path / "a", **settings, **saves)
    checkpoint = tmp_path / "a" / "checkpoints" / "step-00000007"
    # 7 steps of one sequence for each of 8 streams: the windows that had been read when the save began, not those since
    places = json.loads((checkpoint / "data.json").read_text())["places"]
    assert [place["windows"] for place in places.values()] == [7] * 8
    resumed = saved.run(1, "single", tmp_path / "b", **settings, **{"checkpoint.resume": str(checkpoint)})
    assert resumed == {step: loss for step, loss in unbroken.items() if step > 7}


def spoil_last_row(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.lm_head.weight"][-1, -1] = float("nan")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda path, shard: edit_tensors(path, spoil_last_row, shard), "model.lm_head.weight holds NaN or infinity"),
        (lambda path, shard: (path / shard).rename(path / "other"), "shard-00002-model-00001-of-00001.* is missing"),
        (lambda path, shard: os.truncate(path / shard, 1000), "shard-00002-model-00001-of-00001.* has 1000 bytes"),
    ],
)
def test_what_one_rank_finds_ends_all(
    saved: SavedRuns, ranks: RankPool, tmp_path: Path, edit: Callable[[Path, str], object], message: str
) -> None:
    """The NaN lies in rows that the second rank alone reads."""
    path = Path(shutil.copytree(saved.checkpoint(2, "fsdp"), tmp_path / f"step-{AT:08d}"))
    edit(path, "shard-00002-model-00001-of-00001.safetensors")
    texts = ranks.run(2, "tests.distributed.tasks:refused_checkpoint", path=str(path))
    assert texts[0] == texts[1] and re.search(message, texts[0]) and "\n" not in texts[0]
