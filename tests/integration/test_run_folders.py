"""Other jobs, links, other disks and strangers in a run folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loqt_scale.checkpoint import CheckpointError
from loqt_scale.config.paths import same_files
from loqt_scale.training import opening
from loqt_scale.training.runlock import RunInUse
from loqt_scale.training.stopping import Stopped
from tests.integration.lines import FINISHED, LONG, STEPS, Runs, content
from tests.unit.training.test_runlock import another_job


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_second_job_touches_nothing_and_gets_in_after_a_kill(
    runs: Runs, killed: Callable[..., None], resume: str
) -> None:
    from loqt_scale.training.trainer import Trainer

    killed(Trainer, "step", 3, runs)
    with another_job(runs.folder / "run") as job:
        before = content(runs.folder)
        with pytest.raises(RunInUse, match=rf"process {job.pid} on .*write another train\.run_dir"):
            runs(checkpoint__resume=resume)
        assert content(runs.folder) == before and not (runs.folder / "run.old-1").exists()
        job.kill()
        job.wait()  # until then it may be dying, which counts as there
        said = runs(checkpoint__resume=resume)
    assert ("resumed after step 2" in said) == (resume == "auto") and list(runs.losses()) == list(range(1, STEPS + 1))
    assert (runs.folder / "run.old-1").exists() == (resume == "never")
    assert not list(runs.folder.rglob("run.lock*"))


def test_a_folder_in_which_another_job_runs_is_not_moved(runs: Runs) -> None:
    """A run folder inside the one that would make room for this run."""
    (runs.folder / "run" / "b").mkdir(parents=True)
    runs.prepare()
    with another_job(runs.folder / "run" / "b") as job:
        before = content(runs.folder)
        named = rf"cannot be moved aside while a job works in .*run/b \(process {job.pid} on .*\); .*write another tr"
        with pytest.raises(RunInUse, match=named):
            runs.prepare(checkpoint__resume="never")
        assert content(runs.folder) == before and not (runs.folder / "run.old-1").exists()
        job.kill()
        job.wait()  # until then it may be dying, which counts as there
        runs.prepare(checkpoint__resume="never")
    assert (runs.folder / "run.old-1" / "b" / "run.lock").exists()


@pytest.mark.parametrize("event", ["told to stop", "a full disk"])
def test_where_the_old_run_went_is_said_whatever_happens_then(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], event: str
) -> None:
    """Between the move and the new folder."""
    runs.prepare()
    alive = opening.make_room

    def full(*given: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    def disturbed(*given: Any) -> Path | None:
        old = alive(*given)
        if event == "told to stop":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            monkeypatch.setattr(Path, "mkdir", full)
        return old

    monkeypatch.setattr(opening, "make_room", disturbed)
    with pytest.raises((Stopped, PermissionError)) as ended:
        runs(checkpoint__resume="never")
    assert isinstance(ended.value, Stopped) == (event == "told to stop")
    assert f"held another run, which is now {runs.folder / 'run.old-1'}" in capsys.readouterr().out
    assert (runs.folder / "run.old-1" / "begun.json").is_file()


@pytest.mark.parametrize("what", [*(pytest.param(what, marks=LONG) for what in ("checkpoints", "run", "step")), "all"])
def test_links_to_another_disk(runs: Runs, killed: Callable[..., None], what: str) -> None:
    from loqt_scale.training.trainer import Trainer

    runs("unbroken")
    disk, run_dir = runs.folder / "disk", runs.folder / "run"
    disk.mkdir()
    if what in ("run", "all"):
        (disk / "run").mkdir()
        run_dir.symlink_to(disk / "run")
    if what in ("checkpoints", "all"):
        (disk / "checkpoints").mkdir()
        run_dir.mkdir(exist_ok=True)
        (run_dir / "checkpoints").symlink_to(disk / "checkpoints")
    killed(Trainer, "step", 4, runs)
    if what in ("step", "all"):
        for step in (2, 3):
            shutil.move(runs.checkpoint(step), disk / f"moved-{step}")
            runs.checkpoint(step).symlink_to(disk / f"moved-{step}")
    spelled = os.path.relpath(run_dir) if what == "run" else f"{runs.folder}/./run/../run"
    assert "resumed after step 3" in runs(train__run_dir=spelled, checkpoint__keep_last=1)
    assert runs.saved() == [6] and FINISHED in runs() and not (runs.folder / "run.old-1").exists()
    assert runs.losses() == runs.losses("unbroken")
    assert what not in ("step", "all") or (disk / "moved-2" / "manifest.json").exists()


@pytest.mark.long
def test_a_bind_mount(runs: Runs, killed: Callable[..., None]) -> None:
    """The same folder under two paths that no resolving of links makes one."""
    from loqt_scale.training.trainer import Trainer

    disk, run_dir = runs.folder / "disk", runs.folder / "run"
    disk.mkdir()
    run_dir.mkdir()
    if subprocess.run(["mount", "--bind", disk, run_dir], capture_output=True).returncode != 0:
        pytest.skip("this user may not mount")
    try:
        killed(Trainer, "step", 4, runs)
        with another_job(disk), pytest.raises(RunInUse):
            runs()
        said = runs(checkpoint__resume=str(disk / "checkpoints" / "step-00000002"))
        assert "of step 3 to 3" in said and "resumed after step 2" in said and FINISHED in runs("disk")
        said = runs(checkpoint__resume="never")  # a mount point cannot be moved: its run moves inside
        assert f"is now {run_dir / 'old-1'}" in said and (run_dir / "old-1" / "checkpoints" / "latest").exists()
        assert FINISHED in runs()
    finally:
        subprocess.run(["umount", run_dir], check=True)


def test_a_run_folder_that_was_a_link_is_one_no_more_and_says_so(runs: Runs) -> None:
    disk, run_dir = runs.folder / "disk", runs.folder / "run"
    disk.mkdir()
    run_dir.symlink_to(disk)
    runs.prepare(train__steps=1)
    said = runs(train__steps=1, checkpoint__resume="never")
    assert f"run.old-1 is a link to {disk}; this run is written to {run_dir} itself" in said
    assert (runs.folder / "run.old-1").is_symlink() and (disk / "begun.json").exists() and not run_dir.is_symlink()


def test_a_path_through_a_link_is_the_runs_own(runs: Runs) -> None:
    runs()
    (runs.folder / "elsewhere").symlink_to(runs.folder / "run")
    said = runs(checkpoint__resume=str(runs.folder / "elsewhere" / "checkpoints" / "step-00000004"))
    assert "abandoned-1" in said and not (runs.folder / "run.old-1").exists() and FINISHED in runs()


def test_a_text_is_the_same_however_it_is_spelled(runs: Runs, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a tokenizer's folder, or a model's, another one for its name."""
    here = runs.folder / "here"
    here.mkdir()
    for name in ("a.txt", "b.txt"):
        shutil.copy(text_file, here / name)
    (runs.folder / "link").symlink_to(here)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    runs(train__steps=1, data__files=["a.txt", "b.txt"])
    spelled = [["*.txt"], [str(here / "a.txt"), "./b.txt"], [f"{runs.folder}/link/[ab].txt"], ["~/a.txt", "b.txt"]]
    for files in spelled:
        assert runs.prepare(train__steps=1, data__files=files).folder == "over"
    assert runs.prepare(train__steps=1, data__files=["b.txt", "a.txt"]).folder == "new"
    assert same_files(str(here), f"{runs.folder}/link/") and not same_files("bytes", "bpe")
    assert not same_files(None, "here") and same_files("no/such-*", f"{here}/no/such-*")


def test_checkpoints_on_a_disk_that_is_not_there(runs: Runs) -> None:
    runs()
    checkpoints = runs.folder / "run" / "checkpoints"
    shutil.move(checkpoints, runs.folder / "disk")
    checkpoints.symlink_to(runs.folder / "vanished")
    before = content(runs.folder)
    with pytest.raises(CheckpointError, match=r"is a link to .*vanished, which is not there; mount its disk"):
        runs()
    assert content(runs.folder) == before


def test_strays_are_left_alone(runs: Runs) -> None:
    run_dir = runs.folder / "run"
    strays = ["step-1", "step-²", "step-000000001x", "step-00000001.bak", ".step-1.partial", "abandoned-1"]
    strays.append("step-00000002")
    for name in strays:
        (run_dir / "checkpoints" / name).mkdir(parents=True)
        (run_dir / "checkpoints" / name / "mine").touch()
    (run_dir / "checkpoints" / "step-00000003").touch()
    (run_dir / "finished.json").mkdir()
    (run_dir / "begun.txt").write_text("not ours")
    said = runs(checkpoint__keep_last=1)
    assert "WARNING" not in said and runs.latest() == "step-00000006"
    found = [path for path in (runs.folder).rglob("mine")]
    assert len(found) == len(strays)
