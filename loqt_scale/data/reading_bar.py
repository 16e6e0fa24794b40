"""How far the reading of local text has come, and the time left: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from loqt_scale.data.cache import say_on_stderr

_BAR_SECONDS = 2.0  # what takes less shows nothing
_FIRST_LINE, _NEXT_LINES = 30.0, 300.0  # seconds
_FORMAT = "{desc}: {percentage:3.0f}%{bar}{n_fmt} of {total_fmt} [{elapsed}, {remaining} left, {rate_fmt}]"


@contextmanager
def reading_bar(what: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """Shows how much of something has been read.

    Args:
        what: For people: what is done.
        total: Bytes in all.
        done: Bytes that need not be read any more.

    Yields:
        A function that is told how many bytes have been read.
    """
    if not (sys.stderr and sys.stderr.isatty()):
        yield _Lines(what, total, done).show
        return
    settings: dict[str, Any] = {"unit": "B", "unit_scale": True, "smoothing": 0.05, "dynamic_ncols": True}
    bar = tqdm(desc=what, total=total, initial=done, delay=_BAR_SECONDS, bar_format=_FORMAT, **settings)

    def show(read: int) -> None:
        with suppress(OSError):  # its terminal has gone
            bar.update(read - bar.n)

    try:
        yield show
    finally:
        with suppress(OSError):
            bar.close()


class _Lines:
    """Lines on standard error, seldom enough for a log file."""

    def __init__(self, what: str, total: int, done: int) -> None:
        self._what, self._total, self._done = what, total, done
        self._begin = time.monotonic()
        self._next = self._begin + _FIRST_LINE

    def show(self, read: int) -> None:
        """Prints a line if it is time for one."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _NEXT_LINES
        settings: dict[str, Any] = {"unit": "B", "unit_scale": True, "prefix": self._what, "initial": self._done}
        form = _FORMAT.replace("{bar}", " ")
        with suppress(OSError):
            say_on_stderr(tqdm.format_meter(read, self._total, now - self._begin, bar_format=form, **settings))
