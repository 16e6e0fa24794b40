"""How long a launcher lets its ranks live once it was told to stop, and whether that is enough for this run.

A run that gets a signal takes up to two steps more and saves (`training.stopping`). Launchers are less patient:
torchrun and deepspeed pass SIGTERM or Ctrl-C on and kill the ranks 30 seconds later, Open MPI's mpirun after one. What
had been computed since the last checkpoint is lost then, in silence; so it is said while it can still be changed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version

import psutil

from loqt_scale.errors import ConfigError
from loqt_scale.process.environment import OWN, Environment

VARIABLE = "LOQT_SCALE_NOTICE_SECONDS"
"""Seconds from the first signal to the kill, of whatever stands above (a cluster, a container's grace period)."""

_USUAL = 30.0  # torchrun, deepspeed
_OPEN_MPI = 1.0
_OPTIONS = ("--shutdown-timeout", "--shutdown_timeout")  # of torchrun, from torch 2.13 on
RANKS_ONLY = "-u [^ ]*train.py"  # the launchers' own command lines name the script, too, and SIGUSR1 ends a launcher
_BY_HAND = f"to stop it, send SIGUSR1 to the ranks, and not to their launcher: pkill -USR1 -f -- '{RANKS_ONLY}'"


class Notice:
    """Compares the time that a stop takes with what there is for it, and tells once if it is too long.

    Args:
        seconds: From the signal to the kill; infinite = nobody kills.
        killer: Who does, for people.
        remedy: What to write instead; {} stands for a number of seconds that is enough.
    """

    def __init__(self, seconds: float = math.inf, killer: str = "", remedy: str = "") -> None:
        self.seconds, self.killer, self.remedy = seconds, killer, remedy
        self._told = False

    def compare(self, step_seconds: float, save_seconds: float, tell: Callable[[str], None]) -> None:
        """Tells, the first time that two steps and a save take longer than there is.

        Args:
            step_seconds: Of one step.
            save_seconds: Of a checkpoint; 0 = not known yet.
            tell: Takes a line for people.
        """
        needed = 2 * step_seconds + save_seconds
        if self._told or needed <= self.seconds:
            return
        self._told = True
        about, enough = math.ceil(needed), 10 * math.ceil(needed / 5)
        tell(
            f"WARNING: told to stop, this run needs about {about} s for two steps and a save, but {self.killer} "
            f"kills it after {self.seconds:g} s: what came after the last checkpoint would be lost; "
            f"{self.remedy.format(enough)}"
        )


def launchers_notice(environment: Environment = OWN, command: Sequence[str] | None = None) -> Notice:
    """What the launcher of this process gives.

    Args:
        environment: This process's variables.
        command: The command line of what has started it; None: it is looked up.

    Raises:
        ConfigError: What says so is no number of seconds.
    """
    if (given := given_notice(environment)) is not None:
        return Notice(given, f"whoever stops it ({VARIABLE})", f"give it more, and set {VARIABLE}={{}}")
    started_by = _parents_command() if command is None else command
    if "TORCHELASTIC_RUN_ID" in environment:
        return _of_torchrun(environment, started_by)
    if any("deepspeed.launcher.launch" in word for word in started_by):
        return Notice(_USUAL, "deepspeed", _BY_HAND)
    if "OMPI_COMM_WORLD_SIZE" in environment:
        remedy = "to stop it, send SIGUSR1 to mpirun, which passes it on (launch/mpirun.sh does, told to stop)"
        return Notice(_OPEN_MPI, "mpirun", remedy)
    return Notice()


def given_notice(environment: Environment) -> float | None:
    """Seconds that LOQT_SCALE_NOTICE_SECONDS gives; None if it is not set.

    Raises:
        ConfigError: It is no number of seconds.
    """
    return _seconds(environment[VARIABLE], VARIABLE) if VARIABLE in environment else None


def _of_torchrun(environment: Environment, command: Sequence[str]) -> Notice:
    if not knows_shutdown_timeout():
        return Notice(_USUAL, "torchrun", _BY_HAND)
    given = environment.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_USUAL))
    for word, following in zip(command, [*command[1:], ""], strict=True):
        option, _, value = word.partition("=")
        if option in _OPTIONS:
            given = value or following
    return Notice(_seconds(given, "torchrun's --shutdown-timeout"), "torchrun", "write torchrun --shutdown-timeout {}")


def knows_shutdown_timeout() -> bool:
    """Whether the installed torchrun can be told how long to wait: torch 2.13 or newer."""
    major, minor = (int(part) for part in version("torch").split(".")[:2])
    return (major, minor) >= (2, 13)


def _seconds(text: str, name: str) -> float:
    with suppress(ValueError):
        if (seconds := float(text)) >= 0:
            return seconds
    raise ConfigError(f"{name} is '{text}'; write a number of seconds, 0 or more")


def _parents_command() -> list[str]:
    with suppress(psutil.Error, OSError):
        return psutil.Process(os.getppid()).cmdline()
    return []
