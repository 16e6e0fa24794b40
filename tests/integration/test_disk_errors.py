"""Files that cannot be written, or are none of ours: one line that names them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from loqt_scale.checkpoint import CheckpointError
from tests.integration.lines import FINISHED, Runs


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
