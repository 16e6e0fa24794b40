"""The run folder: made, refused, moved aside, and found unusable before anything is allocated."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from loqt_scale.training.rundir import holds_run, make_room, prepare_run_dir


def make_run(folder: Path, name: str = "config.yaml") -> Path:
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("method: loqt\n")
    return folder


def test_makes_folder_and_parents_and_leaves_it_empty(tmp_path):
    folder = tmp_path / "runs" / "a"
    assert prepare_run_dir(folder) == [folder, folder.parent] and prepare_run_dir(folder) == []
    assert folder.is_dir() and not list(folder.iterdir())


def test_a_folder_without_a_run_is_used_as_it_is(tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "checkpoints").mkdir()  # made for this run, on a larger disk perhaps
    assert make_room(tmp_path, "refuse") is None and prepare_run_dir(tmp_path) == []
    assert (tmp_path / "notes.txt").exists() and not holds_run(tmp_path)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "begun.json", "finished.json", "checkpoints/latest"])
def test_refuses_an_old_run_and_says_what_to_write(tmp_path, name):
    folder = make_run(tmp_path / "a", name)
    with pytest.raises(FileExistsError, match=r"already holds a run; write another train\.run_dir, or .* archive"):
        make_room(folder, "refuse")
    assert (folder / name).exists()


def test_archives_old_runs_in_order(tmp_path):
    folder = tmp_path / "a"
    for number in range(3):
        old = make_room(folder, "archive")
        assert old == (tmp_path / f"a.old-{number}" if number else None)
        prepare_run_dir(folder)
        (folder / "config.yaml").write_text(str(number))
    assert (folder / "config.yaml").read_text() == "2"
    assert [(tmp_path / f"a.old-{n}" / "config.yaml").read_text() for n in (1, 2)] == ["0", "1"]


def test_archives_the_link_not_what_it_points_to(tmp_path):
    real = make_run(tmp_path / "disk" / "real")
    link = tmp_path / "a"
    link.symlink_to(real)
    make_room(link, "archive")
    prepare_run_dir(link)
    assert (tmp_path / "a.old-1").is_symlink() and holds_run(real)
    assert link.is_dir() and not link.is_symlink() and not holds_run(link)


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a")
    assert make_room("a/", "archive") == tmp_path / "a.old-1" and prepare_run_dir("a/") == [Path("a")]
    assert holds_run("a.old-1") and not holds_run("a")


def test_the_working_directory_is_never_moved(tmp_path, monkeypatch):
    here = make_run(tmp_path / "here")
    (here / "below").mkdir()
    for place, path in ((here, "."), (here / "below", "..")):
        monkeypatch.chdir(place)
        with pytest.raises(FileExistsError, match="contains the working directory"):
            make_room(path, "archive")
    assert holds_run(here)


@pytest.mark.parametrize("tail", ["file", "file/below", "file/below/more"])
def test_a_file_in_the_way(tmp_path, tail):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"'.*file' is not a folder; write another train\.run_dir"):
        prepare_run_dir(tmp_path / tail)


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # as root no mode bit refuses anything
    with pytest.raises(PermissionError, match=r"cannot be written to \(Read-only file system\); write another"):
        prepare_run_dir(tmp_path / "a")


def test_an_old_run_that_cannot_be_moved(tmp_path, monkeypatch):
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    folder = make_run(tmp_path / "a")
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError, match=r"cannot be moved to '.*a\.old-1' \(Permission denied\)"):
        make_room(folder, "archive")


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="only root mounts")
def test_a_mount_point_stays_and_what_it_holds_moves_inside(tmp_path):
    disk = tmp_path / "run"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        for number in (1, 2):
            (disk / "config.yaml").write_text(f"number: {number}\n")
            assert make_room(disk) == disk / f"old-{number}" and not holds_run(disk)
        assert [(disk / f"old-{n}" / "config.yaml").read_text() for n in (1, 2)] == ["number: 1\n", "number: 2\n"]
    finally:
        subprocess.run(["umount", disk], check=True)
