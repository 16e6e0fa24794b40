"""Being told to stop: SIGTERM (a scheduler wants the machine back), SIGINT (Ctrl-C), SIGHUP (the terminal has gone),
SIGUSR1 and SIGUSR2 (what batch systems send before the time is up, and mpirun passes on).

Where there is nothing to save (start-up, the evaluations before and after training) the first signal ends the run by an
exception, `Stopped`. While it trains (`patience`) the signal only sets a flag, which the next step adds up over the
ranks; the run ends a step after that, saved. A second signal of whatever kind changes nothing. A third one is brutal:
the process ends at once by it, as without this module. (Launchers pass a Ctrl-C on to ranks that the terminal has told
already, torchrun twice: under a launcher what comes within a moment counts as one.)

No torch here: the command line begins to listen before it is loaded (and `entry` for Ctrl-C before that).
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from loqt_scale.process.environment import has_peers, rank_label
from loqt_scale.process.streams import warn

BRUTAL = 3  # the how manieth signal
ECHO_SECONDS = 0.3


class Stopped(SystemExit):
    """The run was told to stop and has saved what there was to save. Exit status 128 + number, as a shell counts.

    Args:
        number: The signal's.
        together: Whether all ranks have agreed to stop here; else this rank was told, or has heard it from another.
    """

    def __init__(self, number: int, *, together: bool = False) -> None:
        super().__init__(128 + number)
        self.number, self.together = number, together

    @property
    def signal_name(self) -> str:
        """`SIGTERM`, `SIGINT`, ..."""
        return signal.Signals(self.number).name


class StopRequest:
    """Context in which signals ask the run to stop instead of killing it (main thread only; else inert)."""

    def __init__(self) -> None:
        self.number: int | None = None  # of the first signal
        self.doing = "before training: nothing had to be saved"  # when a signal ends the run at once; for people
        self._times, self._patient, self._last = 0, False, -math.inf
        self._echoes = has_peers()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {which: signal.signal(which, self._note) for which in _heard()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
        if isinstance(error, Stopped) and not error.together and rank_label() == "0":
            warn(f"stopped by {error.signal_name} {self.doing}")

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Inside, a signal only sets `number`: somebody looks at it, and saves first.

        Raises:
            Stopped: There has been a signal before.
        """
        self.check()
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def check(self) -> None:
        """Raises Stopped if there has been a signal (a library may have swallowed the exception)."""
        if self.number is not None:
            raise Stopped(self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._echoes or now - self._last > ECHO_SECONDS:
            self._times += 1
        self._last = now
        if self._times >= BRUTAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self.number is None:
            self.number = number
            if not self._patient:
                raise Stopped(number)


def _heard() -> list[signal.Signals]:
    """What nohup and its like ignore, SIGHUP above all, is ignored here as well."""
    asking = (getattr(signal, name, None) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2"))
    also = (which for which in asking if which is not None and signal.getsignal(which) is not signal.SIG_IGN)
    return [signal.SIGTERM, signal.SIGINT, *also]
