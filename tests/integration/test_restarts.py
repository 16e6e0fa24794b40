"""Jobs that begin from a path, and are started again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from loqt_scale.checkpoint import CheckpointError
from tests.integration.lines import FINISHED, STEPS, Runs, content
from tests.unit.checkpoint.forging import SHARD


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
    with pytest.raises(CheckpointError, match=r"names 'step-00000004'.*write checkpoint\.resume: PATH.*step-00000003"):
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
