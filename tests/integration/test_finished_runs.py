"""A run that is over: left as it is, evaluated, trained anew, or without its checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest

from loqt_scale.checkpoint import CheckpointError
from tests.integration.lines import FINISHED, STEPS, Runs, content


def test_a_finished_run_is_left_as_it_is(runs: Runs) -> None:
    first = runs()
    before = content(runs.folder)
    again = runs()
    assert FINISHED not in first and f"{FINISHED} {STEPS} steps" in again and "checkpoint.resume: never" in again
    assert content(runs.folder) == before and not (runs.folder / "run" / "run.lock").exists()
    # settings that change no number change nothing about that
    assert FINISHED in runs(checkpoint__keep_last=1, train__eval_every=2) and content(runs.folder) == before


def test_a_run_that_ended_before_its_last_evaluation_is_evaluated(runs: Runs, killed: Callable[..., None]) -> None:
    """By a kill in it, or after it, but before the mark; at every later start too."""
    from loqt_scale.training import job, trainer

    killed(trainer, "evaluate_corpus", 2, runs)
    losses = runs.losses()
    assert list(losses) == list(range(1, STEPS + 1)) and not (runs.folder / "run" / "finished.json").exists()
    killed(job, "summary", 1, runs)
    said = runs()
    assert f"resumed after step {STEPS}" in said and "held-out perplexity" in said and FINISHED not in said
    assert runs.losses() == losses and [row["step"] for row in runs.rows() if "eval/loss" in row] == [0, STEPS]
    assert FINISHED in runs() and [path.name for path in runs.folder.iterdir()] == ["run"]


def test_a_finished_run_is_trained_anew_if_told_so(runs: Runs) -> None:
    runs()
    losses = runs.losses()
    said = runs(checkpoint__resume="never")
    assert "held another run" in said and runs.losses() == losses == runs.losses("run.old-1")
    assert FINISHED in runs()
    with pytest.raises(FileExistsError, match=r"already holds a run; write another train\.run_dir"):
        runs(checkpoint__resume="never", train__on_existing_run="refuse")
    assert runs.losses() == losses and not (runs.folder / "run.old-2").exists()


def test_a_finished_run_makes_room_for_another_one(runs: Runs) -> None:
    runs()
    said = runs(optim__lr=1e-3)
    assert "finished run with other settings (optim.lr was 0.005, is 0.001)" in said and "run.old-1" in said
    assert runs.losses() != runs.losses("run.old-1")


def test_a_finished_run_without_its_checkpoints_is_finished(runs: Runs) -> None:
    """Somebody has made room: nothing is trained a second time, and nothing is moved, unless it is told so."""
    runs(train__steps=2)
    path = str(runs.checkpoint(1))
    runs("other", train__steps=2, checkpoint__resume=path)
    for name in ("run", "other"):
        shutil.rmtree(runs.folder / name / "checkpoints")
    before = content(runs.folder)
    said = runs(train__steps=2)
    assert f"{FINISHED} 2 steps" in said and "holds no checkpoint any more" in said
    assert runs.prepare("other", train__steps=2, checkpoint__resume=path).folder == "over"
    with pytest.raises(CheckpointError, match=r"finished after 2 steps, and .* is 6: put the checkpoints back, or wri"):
        runs()
    assert content(runs.folder) == before
    assert runs.prepare(train__steps=2, optim__lr=1e-3).folder == "new" and (runs.folder / "run.old-1").is_dir()
