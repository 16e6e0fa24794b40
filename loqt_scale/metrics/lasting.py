"""Files that outlast a full disk, a quota, a mount that is away for a while: what cannot be written waits in memory.

Backlog       bytes on their way, in order
AppendedFile  where they go: opened anew after a failure, so that a disk that comes back is found again
LastingFile   both, with a word for people when it begins, now and then while it lasts, and when it is over
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path

from loqt_scale.metrics.reminder import Reminder, Tell

BACKLOG_BYTES = 16 * 2**20  # about 30000 lines of metrics


class Backlog:
    """Bytes that wait until they can be written.

    Args:
        write: Writes the beginning of what it gets and returns how many bytes that were; raises OSError if it cannot.
        limit: Most bytes that wait. Beyond it every second record is given up: a curve stays whole, but coarser.
    """

    def __init__(self, write: Callable[[bytes], int], *, limit: int = BACKLOG_BYTES) -> None:
        self._write, self._limit = write, limit
        self._records: deque[bytes] = deque()
        self._size = 0  # bytes
        self.given_up = 0  # records

    def __len__(self) -> int:
        """Records that wait."""
        return len(self._records)

    def add(self, record: bytes) -> None:
        """Lets a record wait for the next `flush`."""
        self._records.append(record)
        self._size += len(record)
        if self._size > self._limit:
            self._thin()

    def flush(self) -> OSError | None:
        """Writes what waits, the oldest first; returns what hindered it, None if nothing waits any more."""
        try:
            while self._records:
                written = self._write(self._records[0])
                self._size -= written
                rest = self._records.popleft()[written:]
                if rest:  # a full disk takes the first half of a line
                    self._records.appendleft(rest)
        except OSError as error:
            return error
        return None

    def _thin(self) -> None:
        """Gives up every second record; never the first, half of which may have been written."""
        kept: Iterable[bytes] = islice(self._records, 0, None, 2)
        before, self._records = len(self._records), deque(kept)
        self._size = sum(map(len, self._records))
        self.given_up += before - len(self._records)


class AppendedFile:
    """A file that is written at its end only.

    A file that was removed is made anew. In a folder that is another one now (a disk was unmounted, and what lies below
    the mount point shows) nothing is written.

    Args:
        path: The file, in an existing folder.

    Raises:
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._folder = path, path.parent.stat().st_ino
        self._descriptor: int | None = None
        self._open()

    def write(self, data: bytes) -> int:
        """Writes the beginning of `data`, returns how many bytes; raises OSError if it can write none."""
        if self._descriptor is not None and os.fstat(self._descriptor).st_nlink == 0:
            self.close()
        try:
            return os.write(self._open(), data)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Closes it; the next `write` opens it again."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):  # NFS tells here of what it could not keep; nothing can be done any more
                os.close(descriptor)

    def _open(self) -> int:
        if self._descriptor is None:
            if self._path.parent.stat().st_ino != self._folder:
                raise FileNotFoundError(f"{self._path.parent} is another folder now")
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        return self._descriptor


class LastingFile:
    """A file to append records to; no failure of its disk is raised.

    Args:
        path: The file, in an existing folder.
        tell: Takes a line for people.

    Raises:
        OSError: It cannot be opened now, at the beginning.
    """

    def __init__(self, path: Path, tell: Tell) -> None:
        self._path, self._file = path, AppendedFile(path)
        self._backlog = Backlog(self._file.write)
        self._reminder = Reminder(tell)

    def write(self, record: bytes) -> None:
        """Appends a record, now or when it can be written again."""
        waiting = len(self._backlog)
        self._backlog.add(record)
        error = self._backlog.flush()
        if error is None:
            self._reminder.over(f"{self._path} can be written again: {waiting + 1} records were waiting, none does now")
        else:
            self._reminder.trouble(
                f"{self._path} cannot be written ({error.strerror or error}); {len(self._backlog)} records wait in "
                f"memory{self._losses}, training goes on"
            )

    def close(self) -> None:
        """Tries once more to write what waits, says what was lost, and closes; a second call does nothing."""
        error = self._backlog.flush()
        if error is not None:
            self._reminder.insist(
                f"{self._path} could not be written ({error.strerror or error}): its last {len(self._backlog)} records "
                f"are lost{self._losses}"
            )
            self._backlog = Backlog(self._file.write)
        self._file.close()

    @property
    def _losses(self) -> str:
        return f" ({self._backlog.given_up} more had no room there)" if self._backlog.given_up else ""
