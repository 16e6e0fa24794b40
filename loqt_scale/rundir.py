"""The folder of a run: made, found writable, and never silently overwritten.

A folder holds a run if it has a `config.yaml` or a `metrics.jsonl`. Another run is then either refused, or the old
folder is moved aside to `<name>.old-1`, `.old-2`, … All of this happens before anything is allocated: a full disk or a
typo in the path should cost a second, not the time to load 13B parameters. One rank only may call it.
"""

from __future__ import annotations

import os
import tempfile
from itertools import count
from pathlib import Path
from typing import Literal

RUN_FILES = ("config.yaml", "metrics.jsonl")
OnExisting = Literal["refuse", "archive", "keep"]


def prepare_run_dir(path: str | os.PathLike[str], on_existing: OnExisting = "archive") -> Path:
    """Make the folder of a new run (parents too).

    Args:
        path: The folder; it may exist, empty or with files that are no run's.
        on_existing: What to do if it already holds a run: refuse, archive = rename the old folder, or keep = go on in
            it.

    Returns:
        The folder, existing and writable.

    Raises:
        FileExistsError: It holds a run and `on_existing` is refuse (or it is the working directory, which is never
            moved).
        NotADirectoryError: The path, or a parent of it, is a file.
        PermissionError: It cannot be created, moved or written to.
    """
    folder = Path(path)
    _check_is_folder(folder)
    if holds_run(folder) and on_existing != "keep":
        _make_room(folder, on_existing)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The only reliable question is to write: access() is wrong for root, ACLs and read-only mounts.
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
    except OSError as error:
        raise PermissionError(_advice(folder, "cannot be written to", error)) from None
    return folder


def holds_run(path: str | os.PathLike[str]) -> bool:
    """Whether the folder has a config.yaml or a metrics.jsonl."""
    return any((Path(path) / name).exists() for name in RUN_FILES)


def _check_is_folder(folder: Path) -> None:
    for part in (folder, *folder.parents):
        if part.is_dir():
            return
        if part.exists() or part.is_symlink():
            raise NotADirectoryError(
                f"train.run_dir is '{folder}', but '{part}' is not a folder; write another --train.run_dir"
            )


def _make_room(folder: Path, on_existing: OnExisting) -> None:
    # Not resolve(): of a symbolic link the link is moved, so that its name is free again.
    absolute, here = Path(os.path.abspath(folder)), Path.cwd()
    if on_existing == "refuse":
        raise FileExistsError(
            f"train.run_dir '{folder}' already holds a run; write another --train.run_dir, "
            "or --train.on_existing_run archive to move the old one aside"
        )
    if absolute == here or absolute in here.parents:
        raise FileExistsError(
            f"train.run_dir '{folder}' already holds a run and contains the working directory, so it is not moved "
            "aside; write another --train.run_dir, e.g. runs/NAME"
        )
    taken = (absolute.with_name(f"{absolute.name}.old-{number}") for number in count(1))
    target = next(candidate for candidate in taken if not candidate.exists() and not candidate.is_symlink())
    try:
        absolute.rename(target)
    except OSError as error:
        raise PermissionError(_advice(folder, f"cannot be moved to '{target}'", error)) from None


def _advice(folder: Path, what: str, error: OSError) -> str:
    return f"train.run_dir '{folder}' {what} ({error.strerror or error}); write another --train.run_dir"
