"""Standard output and standard error that may lead nowhere: a reader that has gone, a full disk behind them.

Of a command whose work is what it prints, whatever prints may fail to, this package or a library, and some swallow it
(argparse, its --help). So such a command prints through a `Watch`, which remembers. Training and export do not depend
on standard output (see `metrics.console`). A line on standard error never fails (`warn`).
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO, cast

CLOSED = 128 + 13  # as after SIGPIPE, which ends other programs whose reader has gone


class Watch:
    """Standard output, which remembers that a text could not be written to it. Everything else is the stream's.

    Args:
        stream: The real one; None if the process was started without.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text, as the stream does."""
        assert self._stream is not None
        try:
            return self._stream.write(text)
        except OSError as error:
            self._failure = error
            raise

    def undelivered(self) -> OSError | None:
        """Why not all that was printed has arrived; None if it has. After a failure the stream leads to nowhere."""
        try:
            if self._stream is not None:
                self._stream.flush()
        except OSError as error:
            self._failure = self._failure or error
        if self._failure is not None:
            silence_stdout()
        return self._failure


@contextmanager
def watched_stdout() -> Iterator[Watch]:
    """Context in which standard output is watched."""
    watch = Watch(sys.stdout)
    if sys.stdout is None:
        yield watch
        return
    with redirect_stdout(cast(TextIO, watch)):
        yield watch


def silence_stdout() -> None:
    """Sends to nowhere what libraries still print, and what Python flushes at its end: it would fail there, loudly."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


@contextmanager
def warnings_of(speaks: bool) -> Iterator[None]:
    """Context whose warnings all ranks would give alike: those of ranks that do not speak are dropped.

    Args:
        speaks: Whether this rank does.
    """
    with warnings.catch_warnings():
        if not speaks:
            warnings.simplefilter("ignore")
        yield


def warn(text: str) -> None:
    """Prints a line for people on standard error, if there is one that takes it."""
    with suppress(OSError, ValueError):  # a closed pipe, a full disk, a closed file
        print(text, file=sys.stderr, flush=True)
