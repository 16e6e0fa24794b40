"""The run folder: made, refused, moved aside, and found unusable before anything is allocated."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

import pytest

from loqt_scale.rundir import holds_run, prepare_run_dir


def make_run(folder: Path, name: str = "config.yaml") -> Path:
    folder.mkdir(parents=True)
    (folder / name).write_text("method: loqt\n")
    return folder


def test_makes_folder_and_parents_and_leaves_it_empty(tmp_path):
    folder = prepare_run_dir(tmp_path / "runs" / "a", "refuse")
    assert folder.is_dir() and not list(folder.iterdir())


def test_a_folder_without_a_run_is_used_as_it_is(tmp_path):
    (tmp_path / "notes.txt").touch()
    assert prepare_run_dir(tmp_path, "refuse") == tmp_path
    assert (tmp_path / "notes.txt").exists() and not holds_run(tmp_path)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_refuses_an_old_run_and_says_what_to_write(tmp_path, name):
    folder = make_run(tmp_path / "a", name)
    with pytest.raises(FileExistsError, match=r"already holds a run; write another --train\.run_dir, or .* archive"):
        prepare_run_dir(folder, "refuse")
    assert (folder / name).exists()


def test_archives_old_runs_in_order(tmp_path):
    folder = tmp_path / "a"
    for number in range(3):
        prepare_run_dir(folder, "archive")
        (folder / "config.yaml").write_text(str(number))
    assert (folder / "config.yaml").read_text() == "2"
    assert [(tmp_path / f"a.old-{n}" / "config.yaml").read_text() for n in (1, 2)] == ["0", "1"]


def test_archives_the_link_not_what_it_points_to(tmp_path):
    real = make_run(tmp_path / "disk" / "real")
    link = tmp_path / "a"
    link.symlink_to(real)
    prepare_run_dir(link, "archive")
    assert (tmp_path / "a.old-1").is_symlink() and holds_run(real)
    assert link.is_dir() and not link.is_symlink() and not holds_run(link)


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a")
    assert prepare_run_dir("a/", "archive") == Path("a")
    assert holds_run("a.old-1") and not holds_run("a")


def test_the_working_directory_is_never_moved(tmp_path, monkeypatch):
    here = make_run(tmp_path / "here")
    (here / "below").mkdir()
    for place, path in ((here, "."), (here / "below", "..")):
        monkeypatch.chdir(place)
        with pytest.raises(FileExistsError, match="contains the working directory"):
            prepare_run_dir(path, "archive")
    assert holds_run(here)


@pytest.mark.parametrize("tail", ["file", "file/below", "file/below/more"])
def test_a_file_in_the_way(tmp_path, tail):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"'.*file' is not a folder; write another --train\.run_dir"):
        prepare_run_dir(tmp_path / tail, "archive")


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # as root no mode bit refuses anything
    with pytest.raises(PermissionError, match=r"cannot be written to \(Read-only file system\); write another"):
        prepare_run_dir(tmp_path / "a", "refuse")


def test_an_old_run_that_cannot_be_moved(tmp_path, monkeypatch):
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    folder = make_run(tmp_path / "a")
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError, match=r"cannot be moved to '.*a\.old-1' \(Permission denied\)"):
        prepare_run_dir(folder, "archive")
