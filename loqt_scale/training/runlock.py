"""One job per run folder: a lock that says who holds it, and that nobody has to clean up after a kill.

The lock is `run.lock` in the run's folder, so every job that sees the folder sees it, under whatever path and from
whatever node. It names host, process and start time. Whether its holder still lives is found out without clocks:

    same host (and the same view of its processes)   the process is there, and it began when the lock says (to the tick)
    another one                                      the holder touches the file every few seconds; a file that nobody
                                                     has touched while we watched belongs to a job that is gone

It is made by an exclusive creation. The lock of a job that is gone is taken over by a claim: a file named after what
that lock says, made by an exclusive creation too, so that each has one heir. The claim is then renamed to the lock.
A job that is killed between the two leaves its claim, which is taken over in the same way: locks and claims are a line,
and its last one holds the folder. All of this is atomic on NFS too. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
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
            last = _line(self.path)[-1]
            if (contents := _contents(last)) is None:  # it has gone in the meantime
                continue
            holder, heir = _holder(contents), _heir(last, contents)
            if holder is not None and holder.token == self._me.token:
                return
            if self._gone(holder, last):
                if self._inherit(heir):
                    return
            elif last.exists():
                break
        holder = _read(_line(self.path)[-1])
        raise RunInUse(
            f"train.run_dir '{self.path.parent}' is in use by another job ({holder or 'just started'}); wait for its "
            "end, stop it, or write another train.run_dir"
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
            last = _line(path)[-1]
            holder = _read(last)
            if not self._gone(holder, last) and last.exists():
                raise RunInUse(
                    f"train.run_dir '{folder}' holds another run, which cannot be moved aside while a job works in "
                    f"{path.parent} ({holder or 'just started'}); wait for its end, stop it, or write another "
                    "train.run_dir"
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

    def _inherit(self, heir: Path) -> bool:
        """Whether this process is the one that takes over from the last of the line; then the lock names it.

        Who has looked at a lock that is no longer there may still make its claim, but no line leads to that one.
        """
        if not self._create(heir):
            return False
        if _line(self.path)[-1] != heir:
            heir.unlink(missing_ok=True)
            return False
        heir.replace(self.path)
        for rest in self.path.parent.glob(f"{LOCK}.after-*"):
            rest.unlink(missing_ok=True)
        return True

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


def _line(lock: Path) -> list[Path]:
    """A lock and the claims on it: each but the first is the heir of the one before it."""
    line = [lock]
    while (contents := _contents(line[-1])) is not None and (heir := _heir(line[-1], contents)).exists():
        line.append(heir)
    return line


def _heir(path: Path, contents: bytes) -> Path:
    """The file that claims the place of a lock, or of a claim, with these contents."""
    said = hashlib.blake2b(path.name.encode() + contents, digest_size=8).hexdigest()
    return path.with_name(f"{LOCK}.after-{said}")


def _read(path: Path) -> Holder | None:
    """Whom a lock names; None if there is none, or nothing whole in it."""
    return _holder(_contents(path) or b"")


def _contents(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _holder(contents: bytes) -> Holder | None:
    try:
        return Holder(**json.loads(contents))
    except (ValueError, TypeError):
        return None


def _touched(path: Path) -> tuple[int, int] | None:
    """When, and in which file, its last sign of life was; opened, since NFS then asks the server."""
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
        return state.st_ino, state.st_mtime_ns
    except FileNotFoundError:
        return None
