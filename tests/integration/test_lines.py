"""What a start finds in its run folder, and what it does then: real runs, one after another in one folder."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loqt_scale.checkpoint import CheckpointError, Start, identity
from loqt_scale.config import RunConfig
from loqt_scale.config.paths import same_files
from loqt_scale.export import export_checkpoint
from loqt_scale.strategies import Strategy
from loqt_scale.training import opening
from loqt_scale.training.job import train
from loqt_scale.training.opening import OpenRun
from loqt_scale.training.runlock import RunInUse
from loqt_scale.training.stopping import Stopped
from tests.distributed.tasks import small_config
from tests.unit.checkpoint.test_foreign import SHARD, edit_tensors
from tests.unit.metrics.test_metrics import same_curves
from tests.unit.training.test_runlock import another_job

STEPS = 6
FINISHED = "finished after"
LONG = pytest.mark.long


class Runs:
    """Runs with the settings of all of these tests."""

    def __init__(self, common: RunConfig, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.common, self.folder, self._capture = common, folder, capture

    def _config(self, name: str, settings: dict[str, Any]) -> RunConfig:
        config = self.common
        for key, value in {"train__run_dir": str(self.folder / name), **settings}.items():
            config = replaced(config, key.split("__"), value)
        return config

    def __call__(self, name: str = "run", **settings: Any) -> str:
        """One job in a folder; returns what it said. Dots of setting names are written as two underscores."""
        self._capture.readouterr()
        train(self._config(name, settings))
        return self._capture.readouterr().out

    def prepare(self, name: str = "run", **settings: Any) -> Start:
        """All that a job does to its folder before it trains; nothing is trained."""
        with OpenRun(self._config(name, settings), Strategy(torch.device("cpu")), tell=lambda line: None) as run:
            if run.start.finished is None:
                run.prepare()
            return run.start

    def checkpoint(self, step: int, name: str = "run") -> Path:
        return self.folder / name / "checkpoints" / f"step-{step:08d}"

    def saved(self, name: str = "run") -> list[int]:
        found = (self.folder / name / "checkpoints").glob("step-*")
        return sorted(int(path.name.removeprefix("step-")) for path in found)

    def latest(self, name: str = "run") -> str:
        return (self.folder / name / "checkpoints" / "latest").read_text().strip()

    def rows(self, name: str = "run") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def losses(self, name: str = "run") -> dict[int, float]:
        rows = [row for row in self.rows(name) if "train/loss" in row]
        assert len({row["step"] for row in rows}) == len(rows), "a step is there twice"
        return {row["step"]: row["train/loss"] for row in rows}


def replaced(settings: Any, names: list[str], value: Any) -> Any:
    """Settings with one of them replaced, which lies below these groups (parsing takes longer than a test may)."""
    inner = value if len(names) == 1 else replaced(getattr(settings, names[0]), names[1:], value)
    return replace(settings, **{names[0]: inner})


@pytest.fixture(scope="module")
def common(text_file: Path, cache_dir: Path) -> RunConfig:
    settings = {
        "data.files": [str(text_file)],
        "data.cache_dir": str(cache_dir),
        "data.max_eval_sequences": 2,
        "model.overrides": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
        "train.steps": STEPS,
        "train.global_batch_size": 2,
        "optim.warmup_steps": 1,
        "loqt.merge.gap": 3,
        "checkpoint.every": 1,
        "checkpoint.keep_last": 9,
    }
    return small_config(settings)


@pytest.fixture
def runs(common: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runs:
    return Runs(common, tmp_path, capsys)


class Killed(BaseException):
    """What a kill is to a test that goes on: nothing of ours catches it."""


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs something with a function that raises on its n-th call from there on."""

    def run(owner: Any, name: str, call: int, job: Callable[[], Any]) -> None:
        alive, calls = getattr(owner, name), 0

        def deadly(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= call:
                raise Killed
            return alive(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, deadly)
            with pytest.raises(Killed):
                job()

    return run


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# ---- a run that is over ---------------------------------------------------------------------------------------------


def test_a_finished_run_is_left_as_it_is(runs: Runs) -> None:
    first = runs()
    before = content(runs.folder)
    again = runs()
    assert FINISHED not in first and f"{FINISHED} {STEPS} steps" in again and "--checkpoint.resume never" in again
    assert content(runs.folder) == before and not (runs.folder / "run" / "run.lock").exists()
    # settings that change no number change nothing about that
    assert FINISHED in runs(checkpoint__keep_last=1, train__eval_every=2) and content(runs.folder) == before


def test_a_run_that_ended_before_its_last_evaluation_is_evaluated(runs: Runs, killed: Callable[..., None]) -> None:
    """By a kill in it, or after it, but before the mark; at every later start too."""
    from loqt_scale.training import job, trainer

    killed(trainer, "evaluate", 2, runs)
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
    with pytest.raises(FileExistsError, match=r"already holds a run; write another --train\.run_dir"):
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


# ---- an earlier checkpoint -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [True, pytest.param(False, marks=LONG)])
def test_going_back_keeps_both_lines(runs: Runs, background: bool) -> None:
    runs()
    losses, old = runs.losses(), runs.checkpoint(5).joinpath("manifest.json").read_bytes()
    saves = {"checkpoint__keep_last": 2, "checkpoint__keep_every": 4, "checkpoint__background": background}
    said = runs(checkpoint__resume=str(runs.checkpoint(2)), optim__states="float32", **saves)
    aside = runs.folder / "run" / "checkpoints" / "abandoned-1"
    assert "of step 3 to 6" in said and str(aside) in said and "resumed after step 2" in said
    assert runs.saved() == [4, 5, 6] and runs.latest() == "step-00000006"
    assert sorted(path.name for path in aside.glob("step-*")) == [f"step-{n:08d}" for n in (3, 4, 5, 6)]
    assert (aside / "step-00000005" / "manifest.json").read_bytes() == old
    assert len((aside / "metrics.jsonl").read_text().splitlines()) == STEPS + 2 and (aside / "finished.json").exists()
    assert runs.losses() == losses, "the same steps again, bit for bit"
    assert same_curves(runs.folder / "run")
    # the line that was left can be gone back to, and then the other one is set aside
    shutil.rmtree(aside / "step-00000006")
    (aside / "latest").write_text("step-00000005\n")
    said = runs(checkpoint__resume=str(aside), **saves)
    assert "resumed after step 5" in said and runs.latest() == "step-00000006" and runs.saved() == [4, 5, 6]
    assert (aside.with_name("abandoned-2") / "step-00000004").is_dir() and runs.losses() == losses
    assert not aside.exists(), "all of its line is back"


def test_a_refused_way_back_has_changed_nothing(runs: Runs, text_file: Path) -> None:
    """Another text, or a number that is not finite, is found before checkpoints or folders are moved."""
    text = Path(shutil.copy(text_file, runs.folder / "text.txt"))
    settings = {"train__steps": 4, "data__files": [str(text)]}
    runs(**settings)
    spoilt = shutil.copytree(runs.checkpoint(2), runs.folder / "spoilt")
    edit_tensors(spoilt, lambda tensors: tensors["model.model.norm.weight"].fill_(torch.nan), SHARD)
    before = content(runs.folder / "run")
    with pytest.raises(CheckpointError, match=r"norm\.weight holds NaN"):
        runs(checkpoint__resume=str(spoilt), **settings)
    text.write_text(text.read_text()[::-1])
    for name in ("run", "elsewhere"):
        with pytest.raises(CheckpointError, match="the training text is another one"):
            runs(name, checkpoint__resume=str(runs.checkpoint(2)), **settings)
    assert content(runs.folder / "run") == before and not list(runs.folder.glob("run.old*"))
    assert not (runs.folder / "elsewhere").exists()


def starts_after_kills(
    runs: Runs, killed: Callable[..., None], back: dict[str, Any], same: dict[str, Any], **calls: int
) -> Iterator[tuple[dict[str, Any], Start]]:
    """Kills `back` at each call of these functions of `Path`, in a copy of `whole`; what starts next, and how."""
    for name, times in calls.items():
        for call, after in itertools.product(range(1, times + 1), (back, same)):
            shutil.rmtree(runs.folder / "run", ignore_errors=True)
            shutil.copytree(runs.folder / "whole", runs.folder / "run")
            killed(Path, name, call, lambda: runs.prepare(**back))
            yield after, runs.prepare(**after)


def test_going_back_survives_a_kill_at_every_write(runs: Runs, killed: Callable[..., None]) -> None:
    """Whichever command comes next: nothing is lost, and what goes on is one line."""
    runs("whole", train__steps=4)
    back = {"checkpoint__resume": str(runs.checkpoint(2)), "train__steps": 4}
    # two checkpoints are moved; four files replaced: `latest`, that of the line that is left, and the run's records
    for after, start in starts_after_kills(runs, killed, back, {"train__steps": 4}, rename=2, replace=4):
        assert start.checkpoint is not None
        went_back = start.checkpoint.name == "step-00000002"
        assert went_back or (start.finished is not None and after is not back)
        assert runs.saved() == ([1, 2] if went_back else [1, 2, 3, 4])
        found = list((runs.folder / "run").rglob("step-*"))
        assert sorted(path.name for path in found) == [f"step-{n:08d}" for n in (1, 2, 3, 4)]
        assert all((path / "manifest.json").exists() for path in found)


@pytest.fixture
def two_lines(runs: Runs) -> Runs:
    """A run of 4 steps that went back to 2 with other learning rates (it is longer): 3 and 4 are there twice."""
    runs(train__steps=4)
    runs(train__steps=5, checkpoint__resume=str(runs.checkpoint(2)))
    return runs


def test_a_line_that_was_set_aside_comes_back_with_its_metrics(two_lines: Runs) -> None:
    runs, aside = two_lines, two_lines.folder / "run" / "checkpoints" / "abandoned-1"
    second, first = runs.losses(), [json.loads(line) for line in (aside / "metrics.jsonl").read_text().splitlines()]
    digests = {path.name: identity(path) for path in aside.glob("step-*")}
    said = runs(checkpoint__resume=str(aside), train__steps=4)
    assert "are back in" in said and "of step 3 to 5" in said and runs.rows()[:-1] == first[:-1]
    assert same_curves(runs.folder / "run"), "TensorBoard shows this line too"
    assert runs.latest() == "step-00000004" and runs.saved() == [1, 2, 3, 4], "what both lines came of is there"
    assert digests == {path.name: identity(path) for path in (runs.checkpoint(3), runs.checkpoint(4))}
    other = aside.with_name("abandoned-2")
    assert not aside.exists() and FINISHED in runs(train__steps=4)
    # and once more, to a checkpoint before its last, which leaves the later ones where they are
    said = runs(checkpoint__resume=str(other / "step-00000004"), train__steps=5)
    assert "resumed after step 4" in said and runs.saved() == [1, 2, 3, 4, 5] and runs.losses() == second
    assert sorted(path.name for path in other.glob("step-*")) == ["step-00000005"]
    assert {path.name for path in aside.with_name("abandoned-3").glob("step-*")} == set(digests)


def test_bringing_a_line_back_survives_a_kill_at_every_write(two_lines: Runs, killed: Callable[..., None]) -> None:
    runs = two_lines
    shutil.move(runs.folder / "run", runs.folder / "whole")
    checkpoints = runs.folder / "run" / "checkpoints"
    back = {"checkpoint__resume": str(checkpoints / "abandoned-1"), "train__steps": 5}
    everything = sorted(map(identity, (runs.folder / "whole").rglob("step-*")))
    # five checkpoints are moved; replaced: `latest`, two records, `latest` and `ancestors` aside, metrics, `latest`
    for after, start in starts_after_kills(runs, killed, back, {"train__steps": 5}, rename=5, replace=7):
        came_back = start.finished is None
        assert came_back or after is not back
        assert runs.latest() == f"step-0000000{4 if came_back else 5}"
        assert runs.saved() == ([1, 2, 3, 4] if came_back else [1, 2, 3, 4, 5])
        assert max(runs.losses()) == (4 if came_back else 5)
        assert sorted(map(identity, (runs.folder / "run").rglob("step-*"))) == everything


def test_a_full_disk_ends_a_way_back_before_it_began(two_lines: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = two_lines
    before = content(runs.folder)
    alive = shutil.copyfile
    for call, path in itertools.product((1, 2), (runs.checkpoint(1), runs.checkpoint(1).with_name("abandoned-1"))):
        calls = itertools.count(1)

        def full(source: Path, target: Path) -> Path:
            if next(calls) == call:  # noqa: B023
                raise OSError(28, "No space left on device", str(target))
            return alive(source, target)

        monkeypatch.setattr(shutil, "copyfile", full)
        with pytest.raises(PermissionError, match=r"No space left on device.*make room on its disk.* or write another"):
            runs.prepare(checkpoint__resume=str(path), train__steps=5)
        assert content(runs.folder) == before
        assert not runs.checkpoint(2).with_name("abandoned-2").exists()


def test_a_relative_link_is_set_aside_with_what_it_names(runs: Runs) -> None:
    runs(train__steps=3)
    shutil.move(runs.checkpoint(3), runs.folder / "disk")
    runs.checkpoint(3).symlink_to("../../disk")
    runs.prepare(train__steps=3, checkpoint__resume=str(runs.checkpoint(2)))
    aside = runs.folder / "run" / "checkpoints" / "abandoned-1"
    assert (aside / "finished.json").is_file() and not (runs.folder / "run" / "finished.json").exists()
    assert (aside / "step-00000003" / "manifest.json").is_file() and (aside / "step-00000003").is_symlink()
    runs.prepare(train__steps=3, checkpoint__resume=str(aside))
    assert (runs.checkpoint(3) / "manifest.json").is_file() and runs.saved() == [1, 2, 3]


def test_going_back_does_not_forget_where_the_run_began(runs: Runs) -> None:
    runs(train__steps=4)
    begin = {"checkpoint__resume": str(runs.checkpoint(2)), "train__steps": 4}
    runs("other", **begin)
    runs("other", checkpoint__resume=str(runs.checkpoint(3, "other")), train__steps=4)
    said = runs("other", **begin)
    assert FINISHED in said and f"began from {runs.checkpoint(2)}: it has ended; to begin there once more" in said
    assert not (runs.folder / "other.old-1").exists() and runs.saved("other") == [3, 4]


def test_restarts_of_a_run_that_began_from_a_path(runs: Runs, killed: Callable[..., None]) -> None:
    """PATH is where the run begins; what came of it in the run's own folder goes before it, pruned or not."""
    from loqt_scale.training.trainer import Trainer

    runs(train__steps=STEPS)
    losses = runs.losses()
    path = str(runs.checkpoint(2))
    job: Callable[[], str] = lambda: runs("other", checkpoint__resume=path)  # noqa: E731
    killed(Trainer, "step", 1, job)  # nothing saved yet
    said = runs.losses("other") == {} and runs.folder.joinpath("other.old-1").exists()
    assert not said
    killed(Trainer, "step", 3, job)
    assert runs.saved("other") == [3, 4]
    said = job()
    assert "resumed after step 4" in said and f"began from {path}" in said
    assert runs.losses("other") == {step: loss for step, loss in losses.items() if step > 2}
    assert FINISHED in job() and sorted(path.name for path in runs.folder.iterdir()) == ["other", "run"]
    # in its own folder: first it goes back, then it goes on, even when PATH has been pruned
    pruned: Callable[[], str] = lambda: runs(checkpoint__resume=path, checkpoint__keep_last=1)  # noqa: E731
    killed(Trainer, "step", 3, pruned)
    assert runs.saved() == [4] and not Path(path).exists()
    assert "resumed after step 4" in pruned() and runs.losses() == losses and FINISHED in pruned()
    # without PATH the run goes on as well
    assert FINISHED in runs() and FINISHED in runs("other")


def test_a_run_that_began_elsewhere_goes_on_there_without_its_path(runs: Runs, killed: Callable[..., None]) -> None:
    from loqt_scale.training.trainer import Trainer

    runs()
    killed(Trainer, "step", 1, lambda: runs("other", checkpoint__resume=str(runs.checkpoint(2))))
    assert "resumed after step 2" in runs("other") and not runs.folder.joinpath("other.old-1").exists()
    killed(Trainer, "step", 1, lambda: runs("third", checkpoint__resume=str(runs.checkpoint(2))))
    shutil.rmtree(runs.checkpoint(2))
    with pytest.raises(CheckpointError, match="which is not there any more, and has saved nothing; write"):
        runs("third")


def test_never_in_a_restart_goes_on(runs: Runs, killed: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that starts the same command anew after a failure must not begin at 0 each time."""
    from loqt_scale.training.trainer import Trainer

    runs()
    job: Callable[[], str] = lambda: runs(checkpoint__resume="never", train__on_existing_run="archive")  # noqa: E731
    killed(Trainer, "step", 3, job)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "resumed after step 2" in job() and FINISHED in job()
    assert sorted(path.name for path in runs.folder.iterdir()) == ["run", "run.old-1"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert "resumed" not in job() and runs.folder.joinpath("run.old-2").exists()


def test_a_path_is_the_way_on_where_latest_names_nothing(runs: Runs) -> None:
    runs(train__steps=4)
    shutil.rmtree(runs.checkpoint(4))
    with pytest.raises(CheckpointError, match=r"names 'step-00000004'.*write --checkpoint\.resume PATH.*step-00000003"):
        runs(train__steps=4)
    said = runs(train__steps=4, checkpoint__resume=str(runs.checkpoint(3)))
    assert "resumed after step 3" in said and FINISHED in runs(train__steps=4)


def test_without_latest_the_newest_whole_one_is_it(runs: Runs, killed: Callable[..., None]) -> None:
    from loqt_scale.checkpoint import CheckpointFolder

    killed(CheckpointFolder, "point", 1, lambda: runs(train__steps=4, checkpoint__background=False))
    pointer = runs.checkpoint(1).with_name("latest")
    assert runs.saved() == [1] and not pointer.exists()
    said = runs(train__steps=4)
    assert f"{pointer} is not there; step-00000001 is the newest whole" in said and "resumed after step 1" in said
    losses = runs.losses()
    pointer.unlink()
    before = content(runs.folder)
    assert FINISHED in runs(train__steps=4) and content(runs.folder) == before
    (runs.checkpoint(4) / SHARD).unlink()
    said = runs(train__steps=4)
    assert "step-00000003 is the newest whole" in said and "resumed after step 3" in said and "of step 4 to 4" in said
    assert runs.losses() == losses and FINISHED in runs(train__steps=4) and runs.latest() == "step-00000004"


def test_a_checkpoint_that_was_copied_here_is_not_of_a_run_that_begins(runs: Runs) -> None:
    runs(train__steps=1)
    copied = runs.checkpoint(1, "other")
    shutil.copytree(runs.checkpoint(1), copied)
    assert runs.prepare("other", train__steps=2, checkpoint__resume="never").checkpoint is None
    assert [path.name for path in copied.parent.iterdir()] == ["abandoned-1"]
    assert runs.prepare("other", train__steps=2).checkpoint is None


def test_an_old_checkpoint_that_cannot_be_removed_is_told(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = Path.rename

    def busy(self: Path, target: Path) -> Path:
        if str(target).endswith(".pruned"):
            raise OSError(16, "Device or resource busy", str(self))
        return alive(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    said = runs(train__steps=3, checkpoint__keep_last=1)
    assert said.count("cannot be removed: [Errno 16] Device or resource busy") == 2 and runs.saved() == [1, 2, 3]


# ---- two jobs in one folder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_second_job_touches_nothing_and_gets_in_after_a_kill(
    runs: Runs, killed: Callable[..., None], resume: str
) -> None:
    from loqt_scale.training.trainer import Trainer

    killed(Trainer, "step", 3, runs)
    with another_job(runs.folder / "run") as job:
        before = content(runs.folder)
        with pytest.raises(RunInUse, match=rf"process {job.pid} on .*write another --train\.run_dir"):
            runs(checkpoint__resume=resume)
        assert content(runs.folder) == before and not (runs.folder / "run.old-1").exists()
        job.kill()
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
        named = rf"cannot be moved aside while a job works in .*run/b \(process {job.pid} on .*\); .*write another --tr"
        with pytest.raises(RunInUse, match=named):
            runs.prepare(checkpoint__resume="never")
        assert content(runs.folder) == before and not (runs.folder / "run.old-1").exists()
        job.kill()
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


# ---- links, other spellings, strays ----------------------------------------------------------------------------------


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


# ---- more steps, other settings --------------------------------------------------------------------------------------


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
    with pytest.raises(CheckpointError, match=r"may grow but not shrink.*Write 6 or more to go on, or --checkpoint"):
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
    assert "of step 3 or before goes on: --checkpoint.resume PATH" in said
    assert numbers("done") != numbers("long")


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


def test_a_refused_change_names_a_way_that_works(runs: Runs) -> None:
    runs(train__steps=4)
    path = str(runs.checkpoint(4))
    state = content(runs.folder)
    with pytest.raises(
        CheckpointError, match=r"optim\.lr was 0\.005, is 0\.1.*--out DIR --dtype float32, then"
    ) as refused:
        runs("other", checkpoint__resume=path, optim__lr=0.1)
    with pytest.raises(CheckpointError, match=r"model\.overrides was .*loqt\.rank was 8, is 4. .* to go on, or --ch"):
        runs("other", checkpoint__resume=path, model__overrides={}, loqt__rank=4)
    assert content(runs.folder) == state and not (runs.folder / "other").exists()
    assert f"--checkpoint {path} " in str(refused.value)
    export_checkpoint(path, runs.folder / "DIR", dtype="float32")
    weights = {"model__path": str(runs.folder / "DIR"), "model__weights": "pretrained", "model__overrides": {}}
    runs("other", optim__lr=0.1, loqt__quantization__weight="none", **weights)
    last = [row["eval/loss"] for row in runs.rows() if "eval/loss" in row][-1]
    assert runs.rows("other")[0]["eval/loss"] == pytest.approx(last, abs=1e-4), "it begins with the trained weights"


def test_what_stands_where_a_file_of_ours_should_is_named(runs: Runs) -> None:
    (runs.folder / "run" / "run.lock").mkdir(parents=True)
    with pytest.raises(
        PermissionError,
        match=r"cannot be written to \(.*Is a directory: .*run\.lock\); .*rename or remove it, or write",
    ):
        runs()
    (runs.folder / "run" / "run.lock").rmdir()
    (runs.folder / "run" / "begun.json.new").mkdir()
    with pytest.raises(PermissionError, match=r"Is a directory: .*begun\.json\.new\); .*rename or remove it, or write"):
        runs()
    assert [path.name for path in (runs.folder / "run").iterdir()] == ["begun.json.new"]


def test_another_text_is_no_damage(runs: Runs, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(runs.common.data.files[0]).read_text())
    runs(train__steps=2, data__files=[str(text)])
    text.write_text(text.read_text()[::-1])
    with pytest.raises(CheckpointError, match=r"step-00000002: the training text is another one") as refused:
        runs(train__steps=4, data__files=[str(text)])
    told = str(refused.value)
    assert "damaged" not in told and told.count("; ") == 1 and "put the old files back" in told


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EISDIR])
def test_a_mark_that_cannot_be_written_is_one_line_that_names_it(runs: Runs, number: int) -> None:
    """No file is named by what `write` raises on a full disk; a folder of that name shows the same to every user."""
    record = runs.folder / "run" / "finished.json.new"
    if number == errno.ENOSPC:
        record.parent.mkdir(parents=True)
        record.symlink_to("/dev/full")
    else:
        record.mkdir(parents=True)
    with pytest.raises(
        PermissionError, match=r"trained and saved, but .*finished\.json\.new\); .*: the same comm"
    ) as told:
        runs(train__steps=2)
    assert os.strerror(number) in str(told.value) and "None" not in str(told.value)
    record.rmdir() if record.is_dir() else record.unlink()
    assert "resumed after step 2" in runs(train__steps=2) and FINISHED in runs(train__steps=2)


def test_a_full_disk_at_the_start_names_the_file(runs: Runs) -> None:
    (runs.folder / "run").mkdir()
    (runs.folder / "run" / "begun.json.new").symlink_to("/dev/full")
    with pytest.raises(
        PermissionError, match=r"\(No space left on device: .*begun\.json\.new\); make room on its disk"
    ):
        runs.prepare()
