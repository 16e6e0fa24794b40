"""Who takes part, who lives, and why somebody has ended: what ranks say of themselves beside all collectives.

A collective that fails knows a port, not a rank; one that waits for a stopped process knows nothing. So each rank keeps
an entry in the store that the ranks find each other through: its host, its process, a pulse, and at its end the reason.
A thread renews it and reads those of the others; another one, which never waits for the store, looks at what is known.
When a collective has failed, `blame` says whose fault it was.

    starts        all entries are there, or the missing ranks are named
    fails alone   leaves its reason; the others' collectives fail, and they end with that reason
    is killed     leaves nothing; its pulse stops
    hangs in a collective that does not fail (NCCL)   the thread ends the process, with the same last line

No step waits for any of this.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Literal

from torch.distributed.distributed_c10d import Store

from loqt_scale.errors import UserError
from loqt_scale.process.streams import warn
from loqt_scale.strategies.bounded import bounded

End = Literal["", "done", "failed", "stopped", "lost"]
PULSE_SECONDS = 1.0
SILENT_SECONDS = 4.0  # without a pulse, after a failure: gone
LOOK_SECONDS = 8.0  # after a failure, until an entry says why
GRACE_SECONDS = 5.0  # for a collective to notice that its peer has ended
LINGER_SECONDS = 20.0  # of the rank that keeps the store, for the others to read why it ends
WARN_SECONDS = 30.0  # without a pulse
WORD_SECONDS = 2.0  # for a last word to the store


class LostRankError(UserError, ConnectionError):
    """Another rank is missing, or has ended; the message says which, on which host, and why if it is known."""


class StoppedElsewhere(LostRankError):
    """Another rank was told to stop, where ranks need not agree on it.

    Args:
        message: Which one.
        number: The signal's.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


@dataclass(frozen=True)
class Entry:
    """What a rank says of itself.

    Args:
        rank: The rank.
        host: Its node's name.
        process: Its process id there.
        pulse: Grows while it lives.
        end: How it has ended: failed or stopped by itself, or for the loss of another rank.
        reason: Why, for people.
        number: The signal that stopped it.
    """

    rank: int
    host: str
    process: int
    pulse: int = 0
    end: End = ""
    reason: str = ""
    number: int = 0

    @property
    def name(self) -> str:
        """`rank 1 (process 4711 on node-a)`."""
        return f"rank {self.rank} (process {self.process} on {self.host})"


class RollCall:
    """The entries of one job's ranks: `start` waits until all of them are there.

    Args:
        store: What all ranks see, and only they.
        rank: This rank.
        world_size: Ranks.
        timeout_seconds: How long to wait for the others to come, and how long one may hang.
        keeps_store: Whether the store is gone with this process.
        store_lives: Whether the process that keeps it is there; asked before each word to the store.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        timeout_seconds: float,
        keeps_store: bool,
        store_lives: Callable[[], bool] = lambda: True,
    ) -> None:
        self.store, self._rank, self._timeout, self._keeps_store = store, rank, timeout_seconds, keeps_store
        self._store_lives = store_lives
        self._keys = [f"roll/{other}" for other in range(world_size)]
        self._mine = Entry(rank, socket.gethostname(), os.getpid())
        self._lock, self._closed = threading.Lock(), threading.Event()
        self.entries: dict[int, Entry] = {}
        self._changed: dict[int, float] = {}  # when, as far as this rank knows; seconds
        self._answered = time.monotonic()  # the store, last
        self._warned: set[int] = set()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Says that this rank is there, waits for the others, and watches them from then on. Every rank.

        Raises:
            LostRankError: Some ranks did not come, or one has ended already.
        """
        self._publish(self.store)
        self.entries = self._wait_for_all()
        self._answered = time.monotonic()
        self._changed = dict.fromkeys(self.entries, self._answered)
        for work in (self._keep_up, self._watch):
            self._threads.append(threading.Thread(target=work, name="roll-call", daemon=True))
            self._threads[-1].start()

    def end(self, how: End, reason: str = "", number: int = 0) -> None:
        """Leaves word of how this rank ends, for the others. Local."""
        with self._lock:
            self._mine = replace(self._mine, end=how, reason=reason, number=number)
        with suppress(
            RuntimeError, TimeoutError
        ):  # the store goes with its process at this moment, or is stopped with it
            if self._store_lives():
                bounded(lambda: self._publish(self.store), WORD_SECONDS)

    def blame(self) -> LostRankError | None:
        """After a failure: who began it, as far as can be found out in some seconds; None: nobody else. Local."""
        until = time.monotonic() + LOOK_SECONDS
        while time.monotonic() < until:
            guilty = self._ended() or self._silent(SILENT_SECONDS)
            if guilty:
                return _error(guilty)
            time.sleep(0.1)
        return None

    def close(self) -> None:
        """Stops watching. The rank that keeps the store waits until the others have read why, if it has failed."""
        if self._keeps_store and self._mine.end not in ("", "done"):
            self._linger()
        self._closed.set()
        for thread in self._threads:
            thread.join(2 * PULSE_SECONDS)

    # ---- the others' entries ----------------------------------------------------------------------------------------

    def _linger(self) -> None:
        until, pulses = time.monotonic() + LINGER_SECONDS, {entry.rank: entry.pulse for entry in self._others()}
        while time.monotonic() < until and not self._all_know(pulses):
            time.sleep(0.1)

    def _others(self) -> Iterable[Entry]:
        return (entry for entry in self.entries.values() if entry.rank != self._rank)

    def _ended(self) -> list[Entry]:
        """Who has failed, or was stopped, by itself: the first of them."""
        return [entry for entry in self._others() if entry.end in ("failed", "stopped")][:1]

    def _silent(self, seconds: float) -> list[Entry]:
        """Who has neither ended nor shown a pulse for so long; if the store is silent, who keeps it."""
        now = time.monotonic()
        if now - self._answered > seconds:
            return [] if self._keeps_store else [entry for entry in self._others() if entry.rank == 0]
        alive = (entry for entry in self._others() if not entry.end)
        return [entry for entry in alive if now - self._changed[entry.rank] > seconds]

    def _all_know(self, pulses: dict[int, int]) -> bool:
        """Whether all others have ended, are silent, or have read all entries since they had these pulses."""
        if not self._threads:  # this rank ends before all have come: until each of them has, and has ended too
            entries = self._there()
            return len(entries) == len(self._keys) and all(entry.end for entry in entries.values())
        silent = self._silent(SILENT_SECONDS)
        return all(entry.end or entry in silent or entry.pulse > pulses[entry.rank] + 1 for entry in self._others())

    # ---- the store --------------------------------------------------------------------------------------------------

    def _publish(self, store: Store) -> None:
        with self._lock:
            store.set(f"roll/{self._rank}", json.dumps(asdict(self._mine)))

    def _wait_for_all(self) -> dict[int, Entry]:
        until = time.monotonic() + self._timeout
        while True:
            entries = self._answer_in_time(until - time.monotonic())
            gone = [entry for entry in entries.values() if entry.end in ("failed", "stopped")][:1]
            if gone:
                raise _error(gone)
            if len(entries) == len(self._keys):
                return entries
            if time.monotonic() > until:
                missing = [str(rank) for rank in range(len(self._keys)) if rank not in entries]
                raise LostRankError(
                    f"rank {', rank '.join(missing)} of {len(self._keys)} did not come within {self._timeout:.0f} s "
                    "(parallel.timeout_seconds); their own output says why"
                )
            time.sleep(0.05)

    def _answer_in_time(self, seconds: float) -> dict[int, Entry]:
        try:
            return bounded(self._there, max(seconds, SILENT_SECONDS))
        except TimeoutError:
            raise LostRankError(
                f"rank 0 of {len(self._keys)} has not answered within {self._timeout:.0f} s "
                "(parallel.timeout_seconds): stopped, or cut off from the network; start all ranks anew"
            ) from None

    def _there(self) -> dict[int, Entry]:
        there = [key for key in self._keys if self.store.check([key])]
        return {entry.rank: entry for entry in map(_read, self.store.multi_get(there))}

    def _keep_up(self) -> None:
        """A thread: one exchange with the store a second, less often for more than 64 ranks.

        It stands still for as long as the process that keeps the store does.
        """
        store = self.store
        with suppress(RuntimeError):
            store = _clone(store)
        while not self._closed.wait(PULSE_SECONDS * max(1.0, len(self._keys) / 64)):
            if self._store_lives():
                store = self._renew(store)

    def _watch(self) -> None:
        """The other thread: looks once a second at what is known of the others, and how long this rank has waited."""
        stuck = _Stuck()
        while not self._closed.wait(PULSE_SECONDS):
            self._warn_of_silence()
            self._end_if_stuck(stuck.seconds())

    def _renew(self, store: Store) -> Store:
        """One exchange; the connection for the next one."""
        try:
            self._exchange(store)
        except RuntimeError:
            with suppress(RuntimeError):
                return _clone(self.store)
        return store

    def _exchange(self, store: Store) -> None:
        with self._lock:
            self._mine = replace(self._mine, pulse=self._mine.pulse + 1)
        self._publish(store)
        now = time.monotonic()
        for entry in map(_read, store.multi_get(self._keys)):
            if entry != self.entries[entry.rank]:
                self.entries[entry.rank], self._changed[entry.rank] = entry, now
        self._answered = now

    def _warn_of_silence(self) -> None:
        silent = self._silent(WARN_SECONDS)
        speaker = min(rank for rank in self.entries if rank not in {entry.rank for entry in silent})
        for entry in silent:
            if entry.rank not in self._warned and self._rank == speaker:
                warn(f"WARNING: {entry.name} has not been heard of for {WARN_SECONDS:.0f} s")
            self._warned.add(entry.rank)

    def _end_if_stuck(self, seconds: float) -> None:
        """Ends this process if it waits inside one call for a rank that has ended, or is silent for too long."""
        ended = (entry for entry in self._ended() if time.monotonic() - self._changed[entry.rank] > GRACE_SECONDS)
        guilty = list(ended) if seconds > GRACE_SECONDS else []
        if not guilty and seconds > self._timeout:
            guilty = self._silent(self._timeout)
        if guilty and not self._mine.end and not self._closed.is_set():
            self.end("lost")
            error = _error(guilty)
            warn(f"rank {self._rank}: error: {error}")
            sys.stdout.flush()
            os._exit(128 + error.number if isinstance(error, StoppedElsewhere) else 2)


class _Stuck:
    """How long the main thread has been inside one and the same call (a collective that does not return, say)."""

    def __init__(self) -> None:
        self._main = threading.main_thread().ident
        self._place: tuple[int, int] | None = None
        self._since = time.monotonic()

    def seconds(self) -> float:
        """So long, as far as these calls could see."""
        frame = sys._current_frames().get(self._main or 0)
        place = None if frame is None else (id(frame), frame.f_lasti)
        if place != self._place:
            self._place, self._since = place, time.monotonic()
        return time.monotonic() - self._since


def _error(guilty: list[Entry]) -> LostRankError:
    names, first = ", ".join(entry.name for entry in guilty), guilty[0]
    if first.end == "stopped":
        return StoppedElsewhere(f"{names} was told to stop", first.number)
    if first.end == "failed":
        return LostRankError(f"{names} has ended: {first.reason}")
    return LostRankError(
        f"{names} is missing: killed, stopped, or cut off from the network; start all ranks anew, the same command "
        "goes on from the last checkpoint"
    )


def _clone(store: Store) -> Store:
    """A connection of its own: the main thread may wait for a key in the other one."""
    clone: Store = store.clone()  # type: ignore[attr-defined]  # torch's stubs do not know it
    return clone


def _read(value: bytes) -> Entry:
    return Entry(**json.loads(value))
