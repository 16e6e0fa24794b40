"""A run that goes back to an earlier checkpoint: both lines of checkpoints are kept, whatever interrupts it."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loqt_scale.checkpoint import CheckpointError, Start, identity
from tests.integration.lines import FINISHED, LONG, STEPS, Runs, content
from tests.unit.checkpoint.forging import SHARD, edit_tensors
from tests.unit.metrics.test_metrics import same_curves


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
