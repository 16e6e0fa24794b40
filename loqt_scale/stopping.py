"""Being told to stop: SIGTERM (a scheduler wants the machine back) and SIGINT (Ctrl-C) end a run soon, but saved.

The first signal only sets a flag, which the next step adds up over the ranks; the run ends a step after that. A second
Ctrl-C is the usual KeyboardInterrupt.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class Stopped(SystemExit):
    """The run was told to stop and has been saved; exit status 128 + the signal's number, as a shell counts."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class StopRequest:
    """Context in which stop signals are collected instead of ending the process (main thread only; else inert)."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {which: signal.signal(which, self._note) for which in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.number is not None:
            raise KeyboardInterrupt
        self.number = number
