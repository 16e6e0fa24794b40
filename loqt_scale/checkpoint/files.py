"""Files of a checkpoint as those of a stranger: listed, regular, inside the folder, and never reached through a link.

The folder itself may be reached through links (`checkpoints/` on another disk). Below it none is followed, whatever it
points to. No torch here.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping
from io import BufferedReader
from pathlib import Path, PurePosixPath


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why and what to do."""


ELSEWHERE = "write --checkpoint.resume PATH with another checkpoint, or --checkpoint.resume never"


def open_inside(folder: Path, name: str) -> BufferedReader:
    """Opens a regular file of a folder for reading.

    Args:
        folder: The folder.
        name: Relative to it, with `/` between its parts.

    Raises:
        OSError: It is not there, is no regular file, or a part of its name is a link.
    """
    *parents, last = PurePosixPath(name).parts
    where = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for parent in parents:
            where = _replace(where, os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=where))
        # not blocking: a named pipe would wait for somebody who writes
        where = _replace(where, os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=where))
        if not stat.S_ISREG(os.fstat(where).st_mode):
            raise OSError("is no regular file")
        return os.fdopen(os.dup(where), "rb")
    finally:
        os.close(where)


def _replace(old: int, new: int) -> int:
    os.close(old)
    return new


def damaged_files(folder: Path, files: Mapping[str, str], names: Iterable[str] | None = None) -> list[str]:
    """What is wrong with files of a checkpoint that are missing, or not what its manifest says.

    Args:
        folder: The checkpoint's.
        files: sha256 of each file, as the manifest lists them.
        names: Which to look at; default all.
    """
    bad = []
    for name in sorted(files if names is None else names):
        try:
            with open_inside(folder, name) as file:
                same = hashlib.file_digest(file, "sha256").hexdigest() == files.get(name)
        except FileNotFoundError:
            bad.append(f"{name} is missing")
        except OSError as error:
            bad.append(f"{name} cannot be read without following links ({error.strerror or error})")
        else:
            if not same:
                bad.append(f"{name} does not have its checksum")
    return bad


def refuse_damaged(folder: Path, damaged: list[str]) -> None:
    """Raises CheckpointError if the list is not empty."""
    if damaged:
        raise CheckpointError(f"{folder} is damaged: {'; '.join(sorted(damaged))}; {ELSEWHERE}")


def file_digest(path: Path) -> str:
    """sha256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
