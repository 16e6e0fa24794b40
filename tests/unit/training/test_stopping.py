"""Signals: heard at once before training, a flag while it trains; a second changes nothing, a third is brutal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from loqt_scale.training.stopping import Stopped, StopRequest


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_before_training_a_signal_ends_the_run(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Stopped) as raised, StopRequest():
        send(number)
    assert raised.value.code == 128 + number
    assert capsys.readouterr().err == f"stopped by {number.name} before training: nothing had to be saved\n"


def test_while_it_trains_signals_are_noted_and_the_first_counts() -> None:
    with StopRequest() as stop:
        with stop.patience():
            send(signal.SIGTERM, signal.SIGINT)
            assert stop.number == signal.SIGTERM
        with pytest.raises(Stopped):
            stop.check()


def test_a_signal_that_a_library_swallowed_is_not_lost() -> None:
    with StopRequest() as stop:
        with suppress(BaseException):  # as careless libraries do
            send(signal.SIGINT)
        with pytest.raises(Stopped), stop.patience():
            pytest.fail("training began")


def test_handlers_are_given_back_and_an_ignored_hangup_stays_ignored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, hangup)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("world_size", "ended"), [("1", True), ("2", False)])
def test_a_third_signal_is_brutal_unless_it_is_an_echo(world_size: str, ended: bool) -> None:
    """Under a launcher three at once are one Ctrl-C that was passed on twice."""
    code = (
        "import os, signal\nfrom loqt_scale.training.stopping import StopRequest\n"
        "with StopRequest() as stop, stop.patience():\n"
        "    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT): os.kill(os.getpid(), number)\n"
    )
    environment = {**os.environ, "WORLD_SIZE": world_size}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60)
    assert done.returncode == (-signal.SIGINT if ended else 0)
