"""The folder of a run: made, found writable, and never silently overwritten.

A folder holds a run if one of `RUN_FILES` is in it. A run that is not gone on with is then either refused, or its
folder is moved aside to `<name>.old-1`, `.old-2`, … All of this happens before anything is allocated: a full disk or a
typo in the path should cost a second, not the time to load 13B parameters. One rank only may call it.
"""

from __future__ import annotations

import errno
import os
import tempfile
from itertools import count
from pathlib import Path

from loqt_scale.config import OnExisting
from loqt_scale.errors import NotAFolderError, OccupiedFolderError, UnwritableError

RUN_FILES = ("config.yaml", "metrics.jsonl", "begun.json", "finished.json", "checkpoints/latest")
OLD = "old-"  # inside a folder that is a mount point


def prepare_run_dir(path: str | os.PathLike[str]) -> list[Path]:
    """Makes the folder of a run (parents too), or finds it, and finds it writable.

    Returns:
        The folders that were not there before, the innermost first.

    Raises:
        NotADirectoryError: The path, or a parent of it, is a file.
        PermissionError: It cannot be created or written to.
    """
    folder = Path(path)
    _check_is_folder(folder)
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The only reliable question is to write: access() is wrong for root, ACLs and read-only mounts.
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
    except OSError as error:
        raise UnwritableError(_advice(folder, "cannot be written to", error)) from None
    return missing


def make_room(path: str | os.PathLike[str], on_existing: OnExisting = "archive") -> Path | None:
    """Moves a folder aside that holds a run.

    Args:
        path: The folder; it may be empty, or hold files that are no run's, or not exist.
        on_existing: What to do if it holds a run: refuse, or archive = rename it.

    Returns:
        Where the old folder is now; None if it held no run and is where it was.

    Raises:
        FileExistsError: It holds a run and `on_existing` is refuse (or it is the working directory, which is never
            moved).
        PermissionError: It cannot be moved.
    """
    folder = Path(path)
    return _move_aside(folder, on_existing) if holds_run(folder) else None


def holds_run(path: str | os.PathLike[str]) -> bool:
    """Whether one of `RUN_FILES` is in the folder."""
    return any((Path(path) / name).exists() for name in RUN_FILES)


def _check_is_folder(folder: Path) -> None:
    for part in (folder, *folder.parents):
        if part.is_dir():
            return
        if part.exists() or part.is_symlink():
            raise NotAFolderError(
                f"train.run_dir is '{folder}', but '{part}' is not a folder; write another train.run_dir"
            )


def _move_aside(folder: Path, on_existing: OnExisting) -> Path:
    # Not resolve(): of a symbolic link the link is moved, so that its name is free again.
    absolute, here = Path(os.path.abspath(folder)), Path.cwd()
    if on_existing == "refuse":
        raise OccupiedFolderError(
            f"train.run_dir '{folder}' already holds a run; write another train.run_dir, "
            "or train.on_existing_run: archive to move the old one aside"
        )
    if absolute == here or absolute in here.parents:
        raise OccupiedFolderError(
            f"train.run_dir '{folder}' already holds a run and contains the working directory, so it is not moved "
            "aside; write another train.run_dir, e.g. runs/NAME"
        )
    target = _free_name(absolute.parent, f"{absolute.name}.old-")
    try:
        absolute.rename(target)
    except OSError as error:
        if error.errno == errno.EBUSY:  # a disk is mounted there: its own folder cannot be moved, what it holds can
            return _move_contents(folder, absolute)
        raise UnwritableError(_advice(folder, f"cannot be moved to '{target}'", error)) from None
    return target


def _free_name(parent: Path, stem: str) -> Path:
    """The first of stem1, stem2, ... that nothing has."""
    taken = (parent / f"{stem}{number}" for number in count(1))
    return next(candidate for candidate in taken if not candidate.exists() and not candidate.is_symlink())


def _move_contents(folder: Path, absolute: Path) -> Path:
    """Moves what a folder holds into a new folder inside it, but for what was moved there before."""
    target = _free_name(absolute, OLD)
    try:
        entries = [entry for entry in absolute.iterdir() if not entry.name.startswith(OLD)]
        target.mkdir()
        for entry in sorted(entries, key=lambda entry: entry.name in RUN_FILES):  # what makes it a run goes last
            entry.rename(target / entry.name)
    except OSError as error:
        raise UnwritableError(_advice(folder, f"cannot be emptied into '{target}'", error)) from None
    return target


def _advice(folder: Path, what: str, error: OSError) -> str:
    return f"train.run_dir '{folder}' {what} ({error.strerror or error}); write another train.run_dir"
