"""One job per run folder: a lock that says who holds it, and that nobody has to clean up after a kill.

The lock is `run.lock` in the run's folder, so every job that sees the folder sees it, under whatever path and from
whatever node. It names host, process and start time. Whether its holder still lives is found out without clocks:

    same host (and the same view of its processes)   the process is there, and it began when the lock says (to the tick)
    another one                                      the holder touches the file every few seconds; a file that nobody
                                                     has touched while we watched belongs to a job that is gone

It is made by an exclusive creation and taken over by a rename, both atomic on NFS too. No torch here.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from loqt_scale.errors import UserError
from loqt_scale.process import pids

LOCK = "run.lock"
BEAT_SECONDS = 5.0
SILENCE_SECONDS = 60.0  # of another host's job until it counts as gone; file attributes may be cached for that long
_SAME_START_SECONDS = 2.0  # where there are no ticks: start times on a clock that may be set
_ATTEMPTS = 20


class RunInUse(UserError, OSError):
    """Another job holds the folder; the message says which one, and what to write instead."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lock.

    Args:
        host: Its name.
        place: The boot of that host, and the container in it, whose process numbers these are.
        pid: Process number.
        started: When that process began, in seconds since 1970 on its own clock.
        ticks: And in the kernel's ticks since the boot; None: not Linux.
        since: When it took the lock, for people.
        token: Drawn for this lock alone.
    """

    host: str
    place: str
    pid: int
    started: float
    since: str
    token: str
    ticks: int | None = None

    @classmethod
    def here(cls) -> Holder:
        """This process, with a new token."""
        return cls(
            host=socket.gethostname(),
            place=pids.place(),
            pid=os.getpid(),
            started=psutil.Process().create_time(),
            ticks=pids.began(os.getpid()),
            since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
            token=secrets.token_hex(8),
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    def lives(self) -> bool | None:
        """Whether that process is still there; None if that cannot be told from here."""
        if self.place != pids.place():
            return None
        try:
            process = psutil.Process(self.pid)
            return self._is(process) and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:  # somebody else's, but there
            return True

    def _is(self, process: psutil.Process) -> bool:
        """Whether this is the process, and not a later one of its number."""
        if self.ticks is not None:
            return pids.began(self.pid) == self.ticks
        return abs(process.create_time() - self.started) < _SAME_START_SECONDS


class RunLock:
    """Holds a run's folder for this process, as a context.

    Args:
        run_dir: The folder; exists.
        tell: Takes a line for people, before a long wait.
        beat: Seconds between two signs of life.
        silence: Seconds without one after which another host's job counts as gone.

    Raises:
        RunInUse: On entry: another job holds it.
        OSError: On entry: the lock cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        tell: Callable[[str], None] = print,
        beat: float = BEAT_SECONDS,
        silence: float = SILENCE_SECONDS,
    ) -> None:
        self.path, self._me = run_dir / LOCK, Holder.here()
        self._tell, self._beat_seconds, self._silence = tell, beat, silence
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.take()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=self._beat_seconds)  # a disk that hangs must not hold the end up
        self.release(self.path)

    def take(self) -> None:
        """Takes the lock in the folder that has its name now (it may have been moved aside since); see the class."""
        for _ in range(_ATTEMPTS):
            if self._create(self.path):
                return
            holder = _read(self.path)
            if holder is not None and holder.token == self._me.token:
                return
            if not self._gone(holder, self.path):
                if self.path.exists():
                    break
            else:
                self._replace(holder)
        raise RunInUse(
            f"train.run_dir '{self.path.parent}' is in use by another job ({_read(self.path) or 'just started'}); wait "
            "for its end, stop it, or write another --train.run_dir"
        )

    def refuse_jobs_below(self, folder: Path) -> None:
        """Raises RunInUse if a job works in a folder inside this one, which is about to be moved.

        Args:
            folder: A run's folder. Its own lock is not looked at, links are not followed.
        """
        for where, _, names in os.walk(folder):
            path = Path(where, LOCK)
            if LOCK not in names or path.parent == folder:
                continue
            holder = _read(path)
            if not self._gone(holder, path) and path.exists():
                raise RunInUse(
                    f"train.run_dir '{folder}' holds another run, which cannot be moved aside while a job works in "
                    f"{path.parent} ({holder or 'just started'}); wait for its end, stop it, or write another "
                    "--train.run_dir"
                )

    def release(self, path: Path) -> None:
        """Removes this process's lock from where it lies (perhaps in a folder that has been moved aside)."""
        holder = _read(path)
        if holder is not None and holder.token == self._me.token:
            path.unlink(missing_ok=True)

    def _create(self, path: Path) -> bool:
        """Whether there was no such file, and now there is one that names this process."""
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, (json.dumps(asdict(self._me)) + "\n").encode())
            os.fsync(descriptor)
        except BaseException:  # no room, or told to end: nothing is held
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return True

    def _gone(self, holder: Holder | None, path: Path) -> bool:
        """Whether a lock's holder is no more. None, a lock without a holder: who wrote it was killed while it did."""
        lives = None if holder is None else holder.lives()
        if lives is not None:
            return not lives
        seconds = self._silence if holder is not None else min(2.0, self._silence)
        if holder is not None:
            self._tell(f"{path} was left by {holder}; waiting {seconds:.0f} s for a sign of life of it")
        return self._is_silent(path, seconds)

    def _is_silent(self, path: Path, seconds: float) -> bool:
        """Whether nobody touches a file for so long."""
        before, deadline = _touched(path), time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(min(0.5, seconds / 10))
            if _touched(path) != before:
                return False
        return True

    def _replace(self, gone: Holder | None) -> None:
        """Puts this process's lock in place of one whose holder is gone, unless another job has been faster."""
        claim = self.path.with_name(LOCK + ".next")
        if not self._create(claim):
            self._clear(claim)
        elif _read(self.path) == gone:
            with suppress(FileNotFoundError):
                claim.replace(self.path)
        else:
            claim.unlink(missing_ok=True)

    def _clear(self, claim: Path) -> None:
        """Removes the claim of a job that was killed between the two lines which make it and use it."""
        other = _read(claim)
        lives = None if other is None else other.lives()
        if lives is False or (lives is None and self._is_silent(claim, min(2.0, self._silence))):
            claim.unlink(missing_ok=True)
        time.sleep(0.05)

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_seconds):
            try:
                holder = _read(self.path)
                if holder is not None and holder.token != self._me.token:
                    self._give_way(holder)
                elif holder is not None or not self._create(self.path):  # somebody may have tidied up
                    os.utime(self.path)
            except OSError:
                continue  # a disk that does not answer now may do so later

    def _give_way(self, holder: Holder) -> None:
        """This process was asleep for so long that another job goes on in its folder: it must not write there again."""
        folder = self.path.parent
        print(f"error: train.run_dir '{folder}' has been taken over by {holder}; ended", file=sys.stderr, flush=True)
        os._exit(1)


def _read(path: Path) -> Holder | None:
    """Whom a lock names; None if there is none, or nothing whole in it."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _touched(path: Path) -> tuple[int, int] | None:
    """When, and in which file, its last sign of life was; opened, since NFS then asks the server."""
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
        return state.st_ino, state.st_mtime_ns
    except FileNotFoundError:
        return None
