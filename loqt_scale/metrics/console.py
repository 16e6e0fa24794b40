"""Standard output as a run or an export uses it: a reader that has gone, or a full disk behind it, ends neither."""

from __future__ import annotations

import errno
import os
import sys

from loqt_scale.metrics.lasting import Backlog
from loqt_scale.process.streams import silence_stdout, warn

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)  # a closed pipe (`| head -1`), a terminal that was closed
_BACKLOG_BYTES = 2**20


class Console:
    """Lines for people on standard output."""

    def __init__(self) -> None:
        self._backlog = Backlog(_write, limit=_BACKLOG_BYTES)
        self._gone = False

    def line(self, text: str) -> None:
        """Prints a line now, or when it can be printed again; into the void once nobody listens any more."""
        if self._gone:
            return
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        self._backlog.add((text + "\n").encode(encoding, "replace"))
        error = self._backlog.flush()
        if error is not None and error.errno in _GONE:
            self._leave(error)

    def close(self) -> None:
        """Tries once more to print what waits, and says on stderr if that fails."""
        error = None if self._gone else self._backlog.flush()
        if error is not None:
            warn(f"WARNING: standard output could not be written to ({error.strerror})")

    def _leave(self, error: OSError) -> None:
        self._gone = True
        silence_stdout()
        warn(f"WARNING: standard output is closed ({error.strerror}); the work goes on without it")


def _write(data: bytes) -> int:
    stream = sys.stdout
    if stream is None:  # started with standard output closed
        return len(data)
    try:
        descriptor = stream.fileno()
    except (OSError, AttributeError):  # a stand-in, e.g. a notebook's
        stream.write(data.decode(getattr(stream, "encoding", None) or "utf-8", "replace"))
        stream.flush()
        return len(data)
    stream.flush()
    return os.write(descriptor, data)  # not through the stream's buffer, which prints again what it could not print
