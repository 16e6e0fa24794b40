"""Settings that change between a checkpoint and the run that goes on from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import pytest

from loqt_scale.checkpoint import Checkpoint, CheckpointError
from loqt_scale.checkpoint.changes import check_changes
from loqt_scale.export import export_checkpoint
from tests.integration.lines import FINISHED, LONG, STEPS, Runs, content


def test_train_steps_may_grow(runs: Runs, killed: Callable[..., None]) -> None:
    """Of a run that is finished or not; from there on rates and merges are those of a run of the new length."""
    from loqt_scale.training.trainer import Trainer

    runs("long")

    def rates(name: str) -> list[float]:
        return [row["train/lr_low_rank"] for row in runs.rows(name) if "train/loss" in row]

    def steps_with(key: str, name: str) -> list[int]:
        return [row["step"] for row in runs.rows(name) if key in row]

    runs("done", train__steps=4)
    killed(Trainer, "step", 3, lambda: runs("cut", train__steps=4))
    for name, done in (("done", 4), ("cut", 2)):
        before = rates(name)[:done]
        said = runs(name)
        assert f"resumed after step {done}" in said and "train.steps was 4, is 6: from step" in said
        assert rates(name) == [*before, *rates("long")[done:]]
        assert steps_with("merge/seconds", name) == steps_with("merge/seconds", "long")
        assert steps_with("eval/loss", name)[-1] == STEPS
        assert FINISHED in runs(name)
    assert rates("done")[3] != rates("long")[3]
    state = content(runs.folder)
    with pytest.raises(CheckpointError, match=r"may grow but not shrink.*Write 6 or more to go on, or checkpoint"):
        runs("done", train__steps=5)
    assert content(runs.folder) == state


def test_a_run_grows_from_its_stable_part_as_if_it_had_been_longer(runs: Runs) -> None:
    """Under wsd, bit for bit; the checkpoint of before the decay is there for it. After the decay rates jump."""
    wsd = {"optim__schedule": "wsd", "optim__decay_fraction": 0.34}  # 2 of 6 steps, 1 of 4
    sparse = {**wsd, "checkpoint__every": 50, "checkpoint__keep_last": 1}
    runs("long", **wsd)
    runs("short", **sparse, train__steps=4)
    assert runs.saved("short") == [3, 4]
    shutil.copytree(runs.folder / "short", runs.folder / "done")
    said = runs("short", **sparse, checkpoint__resume=str(runs.checkpoint(3, "short")))
    assert "are those of such a run, as they were from its first step" in said

    def numbers(name: str) -> list[dict[str, float]]:
        kept = ("train/loss", "train/lr", "train/grad_norm", "merge/", "eval/", "step")
        return [{k: v for k, v in row.items() if k.startswith(kept) and "seconds" not in k} for row in runs.rows(name)]

    assert numbers("short") == numbers("long")
    said = runs("done", **sparse)
    assert (
        "but the rate goes from 0.1 to 0.364 of its peak, since the decay had begun; without that a checkpoint" in said
    )
    assert "of step 3 or before goes on with checkpoint.resume: PATH" in said
    assert numbers("done") != numbers("long")
    assert runs.saved("done") == [3, 6]  # what was said there can still be done: the decay begins elsewhere by now


def test_a_warm_up_that_is_over_does_not_come_back(runs: Runs, killed: Callable[..., None]) -> None:
    """However much longer the run gets, and however often it is resumed after that."""
    from loqt_scale.training.trainer import Trainer

    half = {"optim__warmup_steps": None, "optim__warmup_fraction": 0.5, "optim__schedule": "constant"}
    killed(Trainer, "step", 3, lambda: runs(**half, train__steps=4))
    killed(Trainer, "step", 2, lambda: runs(**half, train__steps=8))
    state = content(runs.folder)
    with pytest.raises(CheckpointError, match=r"settings have changed .*optim.warmup_fraction was 0.5, is 0.75"):
        runs(**{**half, "optim__warmup_fraction": 0.75}, train__steps=8)
    assert content(runs.folder) == state
    in_steps = {"optim__warmup_steps": 4, "optim__schedule": "constant"}  # of 8: the same
    said = runs(**in_steps, train__steps=9)
    assert "but the warm-up was 2 steps, not 4" in said and "the warm-up stays as the run began: 2 steps" in said
    peak = runs.common.optim.lr
    assert [row["train/lr_low_rank"] / peak for row in runs.rows() if "train/loss" in row] == [0.5] + 8 * [1.0]


def test_merges_that_the_old_end_left_out_are_told(runs: Runs) -> None:
    early = {"loqt__merge__last_step_fraction": 0.4, "loqt__merge__schedule": "constant", "loqt__merge__gap": 2}
    runs(**early, train__steps=4, optim__schedule="constant")
    said = runs(**early, train__steps=8, optim__schedule="constant")
    assert "such a run, but 1 merge(s) of before, which loqt.merge.last_step_fraction had left out, do not" in said
    assert [row["step"] for row in runs.rows() if "merge/seconds" in row] == [1]


@pytest.mark.parametrize(("before", "after"), [pytest.param("float32", "int8", marks=LONG), ("int8", "float32")])
def test_states_may_change(runs: Runs, killed: Callable[..., None], before: str, after: str) -> None:
    from loqt_scale.training.trainer import Trainer

    killed(Trainer, "step", 5, lambda: runs(loqt__rank=32, optim__states=before))
    said = runs(loqt__rank=32, optim__states=after)
    assert f"optim.states was {before}, is {after}: from step 5 on" in said and "resumed after step 4" in said
    runs("all", loqt__rank=32, optim__states=before)
    assert runs.losses()[5] == runs.losses("all")[5], "the next loss depends on what is trained only"
    assert runs.losses()[6] == pytest.approx(runs.losses("all")[6], abs=0.05)


@pytest.mark.parametrize(
    ("strategy", "scheduler", "refused"),
    [("zero stage 2", "WarmupLR", True), ("zero stage 2", None, False), ("fsdp", "WarmupLR", False)],
)
def test_rates_of_deepspeeds_scheduler_do_not_become_ours_unnoticed(
    runs: Runs, strategy: str, scheduler: str | None, refused: bool
) -> None:
    """A run of an earlier version, which took the scheduler of a DeepSpeed JSON; it lies in the run's folder."""
    runs(train__steps=2)
    path = runs.checkpoint(2)
    before = Checkpoint(path)
    (path.parent.parent / "deepspeed.json").write_text(
        json.dumps({"scheduler": {"type": scheduler}} if scheduler else {})
    )
    manifest = before.manifest.model_copy(update={"strategy": strategy})
    if not refused:
        assert check_changes(path, manifest, {}, before.settings()) == []
        return
    said = "were those of DeepSpeed's scheduler WarmupLR, .* loqt-scale export --checkpoint .*step-00000002 --out DIR"
    with pytest.raises(CheckpointError, match=said):
        check_changes(path, manifest, {}, before.settings())


def test_a_refused_change_names_a_way_that_works(runs: Runs) -> None:
    runs(train__steps=4)
    path = str(runs.checkpoint(4))
    state = content(runs.folder)
    with pytest.raises(
        CheckpointError, match=r"optim\.lr was 0\.005, is 0\.1.*--out DIR --dtype float32, then"
    ) as refused:
        runs("other", checkpoint__resume=path, optim__lr=0.1)
    with pytest.raises(CheckpointError, match=r"model\.overrides was .*loqt\.rank was 8, is 4. .* to go on, or ch"):
        runs("other", checkpoint__resume=path, model__overrides={}, loqt__rank=4)
    assert content(runs.folder) == state and not (runs.folder / "other").exists()
    assert f"--checkpoint {path} " in str(refused.value)
    export_checkpoint(path, runs.folder / "DIR", dtype="float32")
    weights = {"model__path": str(runs.folder / "DIR"), "model__weights": "pretrained", "model__overrides": {}}
    runs("other", optim__lr=0.1, loqt__quantization__weight="none", **weights)
    last = [row["eval/loss"] for row in runs.rows() if "eval/loss" in row][-1]
    assert runs.rows("other")[0]["eval/loss"] == pytest.approx(last, abs=1e-4), "it begins with the trained weights"
