"""Jobs whose ranks start in milliseconds: forked from a process that has imported everything and computed nothing.

Starting Python and importing torch takes most of a short run's time. A script that starts hundreds of short runs calls
`warm_up` once and then `Job(words, ...)` for each: every rank is a fork that calls the console command's `main` in a
session of its own, with what a launcher would have set in its environment, and dies with the process that started it.
Nothing is replaced in the product. What a fork cannot show is the time of the imports themselves.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path

from common import ROOT  # noqa: F401  (puts the checkout on the path)

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PARENT_DIES = 1  # prctl's PR_SET_PDEATHSIG
_UNFLUSHED = 120  # how the interpreter itself ends when its last words cannot be written

Words = Sequence[str] | Callable[[int], Sequence[str]]


def warm_up(*, deepspeed: bool = True) -> None:
    """Imports what a run imports, without starting a thread; the process must not compute anything afterwards.

    Raises:
        RuntimeError: An import has started a thread, which a fork would lose.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    import torch

    torch.set_num_threads(1)
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    import loqt_scale.export
    import loqt_scale.inference
    import loqt_scale.plan
    import loqt_scale.training.job  # noqa: F401

    if deepspeed:
        from loqt_scale.strategies.zero.engine import import_deepspeed

        import_deepspeed(torch.device("cpu"), "error")
    threads = len(os.listdir("/proc/self/task")) if Path("/proc/self/task").is_dir() else 1
    if threads > 1:
        raise RuntimeError(f"{threads} threads are running after the imports; forks would miss all but one")


class Job:
    """A command on so many ranks of this machine, running.

    Args:
        words: The command and its arguments, as after `loqt-scale`; or a function of the rank that returns them.
        logs: Folder of each rank's output (made here): `rank-0.log`, ...
        ranks: Processes; with one, no launcher's variables are set, unless `launched`.
        launched: Set a launcher's variables for one rank too (zero and fsdp insist on them).
        environment: More variables.
        prepare: Runs in each rank before the command: other limits, another working directory, another user.
    """

    def __init__(
        self,
        words: Words,
        logs: Path,
        *,
        ranks: int = 1,
        launched: bool = False,
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[int], None] | None = None,
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs, self.began = logs, time.monotonic()
        shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        context, self.processes = get_context("fork"), []
        for rank in range(ranks):
            mine = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 or launched else {}
            own_words = list(words(rank) if callable(words) else words)
            arguments = (own_words, self._log(rank), mine | dict(environment or {}), rank, prepare)
            process = context.Process(target=_rank, args=arguments, name=f"rank {rank}")
            process.start()
            self.processes.append(process)

    @property
    def running(self) -> bool:
        """Whether any rank has not ended yet."""
        return any(process.exitcode is None for process in self.processes)

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """Sends a signal to one rank, or to all; those that have ended are left out."""
        for index, process in enumerate(self.processes):
            if rank in (None, index) and process.exitcode is None and process.pid is not None:
                os.kill(process.pid, number)

    def wait(self, seconds: float) -> list[int | None]:
        """Exit statuses by rank, a negative signal's number for who was killed; who is not done in time is killed.

        A rank that had to be killed here has status None.
        """
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [process.exitcode is None for process in self.processes]
        self.kill()
        return [None if hung else process.exitcode for hung, process in zip(late, self.processes, strict=True)]

    def kill(self) -> None:
        """SIGKILL to every rank and what it has started."""
        for process in self.processes:
            if process.pid is not None:
                _kill_session(process.pid)
            process.join()

    def output(self, rank: int | None = None) -> str:
        """What one rank, or all, have written to stdout and stderr so far."""
        chosen = range(len(self.processes)) if rank is None else [rank]
        return "".join(self._log(index).read_text(errors="replace") for index in chosen if self._log(index).exists())

    def _log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _kill_session(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # it has not come to setsid yet, or is gone
        with contextlib.suppress(ProcessLookupError):
            os.kill(leader, signal.SIGKILL)


def _rank(
    words: list[str], log: Path, environment: dict[str, str], rank: int, prepare: Callable[[int], None] | None
) -> None:
    os.setsid()
    ctypes.CDLL(None).prctl(_PARENT_DIES, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(environment)
    _redirect(log)
    if prepare is not None:
        prepare(rank)
    from loqt_scale.cli import main

    status = main(words)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        os._exit(_UNFLUSHED)
    sys.exit(status)


def _redirect(log: Path) -> None:
    """Standard output and error of this process go to a file, as a scheduler would have it."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for target in (1, 2):
        os.dup2(descriptor, target)
    os.close(descriptor)
    # as the interpreter makes them for a file: only standard error is unbuffered
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = io.TextIOWrapper(open(2, "wb", 0, closefd=False), write_through=True)  # noqa: SIM115
