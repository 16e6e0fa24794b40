"""Where commands come in: a Ctrl-C is heard before anything is imported that takes long.

An import that is interrupted cannot say so on one line, and some libraries swallow the exception. While they load there
is nothing to save, so the process ends right in the handler. When the command is over, a further Ctrl-C ends the
process without a word. Standard streams that are closed are held, too, before a file is opened.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from loqt_scale.process.environment import speaks_for_its_node


def main() -> int:
    """The console command `loqt-scale`; returns its exit status."""
    hold_standard_streams()
    with _silent_when_over():
        with _ending_at_once("loqt-scale"):
            from loqt_scale.cli import main as run
        return run()


def enter(name: str, argv: Sequence[str], prog: str) -> int:
    """Runs one subcommand, as `loqt_scale.cli.run_command` does; returns its exit status."""
    hold_standard_streams()
    with _silent_when_over():
        with _ending_at_once(prog):
            from loqt_scale.cli import run_command as run
        return run(name, argv, prog)


def hold_standard_streams() -> None:
    """Takes the places of standard streams that the process was started without (`>&-`), or a file of ours would.

    What is written to such a standard output fails, as it does where a reader has gone; errors are told to nobody.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, mode), True)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)


@contextmanager
def _ending_at_once(prog: str) -> Iterator[None]:
    """Inside, Ctrl-C ends the process with one line and status 130."""

    def end(number: int, frame: FrameType | None) -> None:
        if speaks_for_its_node():
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
