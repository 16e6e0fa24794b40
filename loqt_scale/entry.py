"""Where commands come in: a Ctrl-C is heard before anything is imported that takes long.

An import that is interrupted cannot say so on one line, and some libraries swallow the exception. While they load there
is nothing to save, so the process ends right in the handler. When the command is over, a further Ctrl-C ends the
process without a word.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType


def main() -> int:
    """The console command `loqt-scale`; returns its exit status."""
    with _silent_when_over():
        with _ending_at_once("loqt-scale"):
            from loqt_scale.cli import main as run
        return run()


def enter(name: str, argv: Sequence[str], prog: str) -> int:
    """Runs one subcommand, as `loqt_scale.cli.run_command` does; returns its exit status."""
    with _silent_when_over():
        with _ending_at_once(prog):
            from loqt_scale.cli import run_command as run
        return run(name, argv, prog)


@contextmanager
def _ending_at_once(prog: str) -> Iterator[None]:
    """Inside, Ctrl-C ends the process with one line and status 130."""

    def end(number: int, frame: FrameType | None) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            with suppress(OSError):
                os.write(2, f"{prog}: error: interrupted\n".encode())
        os._exit(128 + number)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, end)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def _silent_when_over() -> Iterator[None]:
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
