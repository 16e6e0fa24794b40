"""Files of a checkpoint as those of a stranger: listed, regular, inside the folder, and never reached through a link.

The folder itself may be reached through links (`checkpoints/` on another disk). Below it none is followed, whatever it
points to. What is verified is what is read: a file that has become another one since it was first opened (inode, size,
time of the last change) is refused. No torch here.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from loqt_scale.errors import UserError

ELSEWHERE = "write another checkpoint's folder (of a run: checkpoint.resume: PATH, or never to start anew)"
_GREATEST_DOCUMENT = 2**28  # bytes of a file that is read at once; a tokenizer's are the largest


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message says why and what to do."""


class _FileError(CheckpointError):
    """What is wrong with one file, in a few words."""


class _Identity(NamedTuple):
    """What stays the same of a file that nobody writes to. `changed` cannot be set by programs, unlike `modified`."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int


class ListedFiles:
    """The files that a manifest lists; no others are opened.

    Args:
        folder: The checkpoint's.
        digests: sha256 of each file, by its name relative to the folder.
        sizes: Bytes of each file, as far as they are known.
    """

    def __init__(self, folder: Path, digests: Mapping[str, str], sizes: Mapping[str, int] | None = None) -> None:
        self.folder, self._digests, self._sizes = folder, digests, sizes or {}
        self._known: dict[str, _Identity] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._digests

    def __iter__(self) -> Iterator[str]:
        """Names, sorted."""
        return iter(sorted(self._digests))

    @contextmanager
    def open(self, name: str) -> Iterator[BufferedReader]:
        """Context in which a file is open, and is the one that it was the first time.

        Raises:
            CheckpointError: It is missing, not listed, no regular file, a link, of another size, or has changed.
        """
        try:
            with _open_inside(self.folder, name) as file:
                self._recognize(name, file)
                yield file
                self._recognize(name, file)
        except OSError as error:
            raise self.error(_what_is_wrong(name, error)) from None
        except _FileError as error:
            raise self.error(str(error)) from None

    def read(self, name: str) -> bytes:
        """The verified bytes of a side file.

        Raises:
            CheckpointError: As `open`; or it is too large, or does not have its checksum.
        """
        with self.open(name) as file:
            content = file.read(_GREATEST_DOCUMENT + 1)
        if len(content) > _GREATEST_DOCUMENT:
            raise self.error(f"{name} is larger than {_GREATEST_DOCUMENT >> 20} MiB")
        if hashlib.sha256(content).hexdigest() != self._digests[name]:
            raise self.error(f"{name} does not have its checksum")
        return content

    def damaged(self, names: Iterable[str] | None = None) -> list[str]:
        """What is wrong with files (default: all) that are missing or are not what the manifest says."""
        return [text for name in (self if names is None else names) if (text := self._defect(name, self._compare))]

    def absent(self) -> list[str]:
        """What is wrong with files that are missing or of another size; their contents are not read."""
        return [text for name in self if (text := self._defect(name, self._recognize))]

    def error(self, *damaged: str) -> CheckpointError:
        """The error that says what is wrong with files."""
        return CheckpointError(f"{self.folder} is damaged: {'; '.join(sorted(damaged))}; {ELSEWHERE}")

    def unlisted(self) -> list[str]:
        """Names of files and links in the folder that nobody lists, hidden ones left out; they are never opened."""
        found = []
        for where, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            links = [name for name in folders if os.path.islink(os.path.join(where, name))]
            found += [os.path.relpath(os.path.join(where, name), self.folder) for name in (*names, *links)]
        return sorted(name for name in found if name not in self._digests and not Path(name).name.startswith("."))

    def _defect(self, name: str, check: Callable[[str, BufferedReader], None]) -> str | None:
        """Why a file cannot be opened, or does not pass a check, in a few words; None if it does."""
        try:
            with _open_inside(self.folder, name) as file:
                check(name, file)
        except OSError as error:
            return _what_is_wrong(name, error)
        except _FileError as error:
            return str(error)
        return None

    def _compare(self, name: str, file: BufferedReader) -> None:
        self._recognize(name, file)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._recognize(name, file)
        if digest != self._digests[name]:
            raise _FileError(f"{name} does not have its checksum")

    def _recognize(self, name: str, file: BufferedReader) -> None:
        if name not in self._digests:
            raise _FileError(f"{name} is not listed in its manifest")
        found = os.fstat(file.fileno())
        if found.st_size != self._sizes.get(name, found.st_size):
            raise _FileError(f"{name} has {found.st_size} bytes, not {self._sizes[name]}")
        now = _Identity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if self._known.setdefault(name, now) != now:
            raise _FileError(f"{name} has changed while it was read")


def read_inside(folder: Path, name: str, most: int) -> bytes:
    """At most `most` bytes of a regular file of a folder.

    Raises:
        OSError: It is not there, is no regular file, or a part of its name is a link.
    """
    with _open_inside(folder, name) as file:
        return file.read(most)


def _open_inside(folder: Path, name: str) -> BufferedReader:
    """Opens a file without following a link below the folder; `name` has `/` between its parts."""
    *parents, last = PurePosixPath(name).parts
    where = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for parent in parents:
            where = _moved(where, os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=where))
        # not blocking: a named pipe would wait for somebody who writes
        where = _moved(where, os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=where))
        if not stat.S_ISREG(os.fstat(where).st_mode):
            raise OSError("it is no regular file")
        return os.fdopen(os.dup(where), "rb")
    finally:
        os.close(where)


def _moved(old: int, new: int) -> int:
    os.close(old)
    return new


def _what_is_wrong(name: str, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{name} is missing"
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return f"{name} is or lies behind a link, which is never followed"
    return f"{name} cannot be read ({error.strerror or error})"


def file_digest(path: Path) -> str:
    """sha256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
