"""One logical stream: sequences that background threads read ahead, forward only.

A later step is reached by reading up to it. An earlier step cannot be reached. A run that goes on need not read all
again: the reader says of each chunk where it began (`Place`), a checkpoint keeps that, the next reader starts there.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from queue import SimpleQueue
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from loqt_scale.data.batches import Batch, batch_of, check_range
from loqt_scale.data.packing import Int64Array
from loqt_scale.errors import UserError

READER_THREADS = 8
"""Threads that read for all streams of a rank; more would only take the interpreter from the training loop."""

_STEPS_AHEAD = 2  # a stream waits when so much of it has been read
_STEPS_KNOWN = 4  # a step may be taken back when the next one has been read
_JOIN_SECONDS = 5.0

_Count = Annotated[int, Field(ge=0, lt=2**53)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid"))
class Place:
    """A point of a logical stream from which it can be read on.

    Args:
        piece: How many pieces of the data set the stream has read before the one it is in.
        row: Rows of this piece that lie before the block which the point is in.
        texts: Documents of this block, in its shuffled order, that lie before the point.
        rest: Tokens before the point that are in no window yet.
        windows: Windows after the point that have been read.
    """

    piece: _Count = 0
    row: _Count = 0
    texts: _Count = 0
    rest: Annotated[tuple[_Count, ...], Field(strict=False)] = ()
    windows: _Count = 0


Chunk = tuple[Int64Array, Place]


class Readers:
    """Threads that read ahead for several streams, a chunk of each in turn.

    Args:
        threads: How many; each starts when there is work for it.
    """

    def __init__(self, threads: int = READER_THREADS) -> None:
        self._waiting: SimpleQueue[_Source | None] = SimpleQueue()
        self._most, self._threads = threads, list[threading.Thread]()
        # Freed with its threads at work, it only asks them to stop. It must not wait for them: garbage is collected at
        # any moment, this thread may hold the import lock, and they may be importing.
        weakref.finalize(self, _dismiss, self._waiting, threads)
        # A daemon thread inside pyarrow while the interpreter tears down its modules would crash.
        atexit.register(_end_if_alive, weakref.ref(self))

    def serve(self, source: _Source) -> None:
        """Reads for a source from now on, until it ends."""
        source.begin(self._waiting)
        if len(self._threads) < self._most:
            thread = threading.Thread(target=_take_turns, args=(self._waiting,), name="data-stream", daemon=True)
            thread.start()
            self._threads.append(thread)

    def end(self) -> None:
        """Ends the threads; each finishes the chunk that it is at."""
        _dismiss(self._waiting, len(self._threads))
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)


def _dismiss(waiting: SimpleQueue[_Source | None], threads: int) -> None:
    for _ in range(threads):
        waiting.put(None)


def _end_if_alive(readers: weakref.ref[Readers]) -> None:
    found = readers()
    if found is not None:
        found.end()


def _take_turns(waiting: SimpleQueue[_Source | None]) -> None:
    while (source := waiting.get()) is not None:
        if source.read_a_chunk():
            waiting.put(source)
        del source  # the threads hold no source while they wait


class LogicalStream:
    """Sequences read from an endless iterator in background threads.

    The reading starts with the first call of `begin` or `sequences`: a run which only evaluates reads nothing.

    Args:
        open_windows: Starts the iterator at a place: (m, T + 1) int64 windows, m >= 1, each time with the place that
            they begin at; without end. Called in a thread.
        per_step: Sequences of a step that are this stream's, at most.
        taken: How many of a step are; default: always as many.
    """

    def __init__(
        self,
        open_windows: Callable[[Place], Iterator[Chunk]],
        *,
        per_step: int,
        taken: Callable[[int], int] | None = None,
    ) -> None:
        self._open_windows, self._per_step, self._taken = open_windows, per_step, taken
        self._source: _Source | None = None
        self._alone: Readers | None = None  # if nobody else's read
        self._skipped = 0  # windows of the first chunks, read before
        self._closed = False
        self._place = Place()
        self._begins: dict[int, Place] = {}  # where the last few steps begin
        self._pending: Int64Array | None = None
        self._error: Exception | None = None
        self._step = -1
        self._batch: Int64Array | None = None

    @property
    def pieces(self) -> int:
        """Pieces of the data set that it has read, up to the last sequence that was asked for."""
        return self._place.piece

    def begin(self, readers: Readers | None = None) -> None:
        """Starts to read ahead, if it has not begun.

        Args:
            readers: Whose threads read; default: a thread of its own.
        """
        if self._closed:
            raise ValueError("this stream was closed; build the corpus anew to read on")
        if self._source is None:
            self._skipped = self._place.windows
            opened = partial(self._open_windows, replace(self._place, windows=0))
            self._source = _Source(opened, _STEPS_AHEAD * self._per_step)
            if readers is None:
                readers = self._alone = Readers(1)
            readers.serve(self._source)
            self._end = weakref.finalize(self, self._source.end)

    def sequences(self, step: int, start: int, stop: int) -> Batch:
        """Sequences [start, stop) of this stream's in a step, which must not decrease; in any ranges, repeatedly."""
        check_range(step, start, stop, self._size(step))
        if step < self._step:
            raise ValueError(
                f"step {step} was asked for after step {self._step}, and a streamed data set only goes forward; build "
                "the corpus anew to go back (or download the data set and write data.files)"
            )
        while self._step < step:
            self._begins[self._step + 1] = self._place
            self._begins.pop(self._step + 1 - _STEPS_KNOWN, None)
            self._batch = self._next_batch(self._size(self._step + 1))
            self._step += 1
        assert self._batch is not None
        return batch_of(self._batch[start:stop])

    def position(self, step: int) -> dict[str, Any] | None:
        """Where a step begins; None: it is neither one of the last few that were read nor the one after them.

        A step that could not be read, or not wholly, begins where it did before that.
        """
        begins = {self._step + 1: self._place} | self._begins
        return asdict(begins[step]) if step in begins else None

    def seek(self, step: int, position: dict[str, Any]) -> None:
        """Makes `step` the next one, on a stream that has not been read yet.

        Raises:
            ValueError: `position` is none of this stream's.
        """
        assert self._source is None, "read already"
        try:
            place = Place(**position)
        except (ValidationError, TypeError):
            raise UserError(f"{ascii(position)[:60]} is no place of a stream") from None
        if place.windows > step * self._per_step:
            raise UserError(f"{place.windows} sequences were not read in {step} steps of {self._per_step}")
        self._step, self._place = step - 1, place

    def close(self) -> None:
        """Ends the reading; steps that were not read yet cannot be read any more."""
        self._closed = True
        if self._source is not None:
            self._end()
            self._source = None  # and with it its file
        if self._alone is not None:
            self._alone.end()

    def _size(self, step: int) -> int:
        return self._per_step if self._taken is None else self._taken(step)

    def _next_batch(self, missing: int) -> Int64Array:
        parts: list[Int64Array] = [] if missing else [np.empty((0, 1), dtype=np.int64)]
        while missing:
            windows = self._pending if self._pending is not None else self._next_windows()
            parts.append(windows[:missing])
            self._place = replace(self._place, windows=self._place.windows + len(parts[-1]))
            self._pending = windows[missing:] if len(windows) > missing else None
            missing -= len(parts[-1])
        return np.concatenate(parts)

    def _next_windows(self) -> Int64Array:
        if self._error is not None:
            raise self._error
        self.begin()
        assert self._source is not None
        while True:
            item = self._source.get()
            if isinstance(item, Exception):
                self._error = item
                raise item
            windows, place = item
            if self._skipped < len(windows):
                skipped, self._skipped = self._skipped, 0
                self._place = replace(place, windows=skipped)
                return windows[skipped:]
            self._skipped -= len(windows)


class _Source:
    """What has been read of a stream and nobody has taken, and its iterator, which a thread advances in its turn.

    It holds no `LogicalStream`, so that one can be freed. Full, it is in no queue of threads until something is taken.
    """

    def __init__(self, open_windows: Callable[[], Iterator[Chunk]], least: int) -> None:
        self._open_windows, self._least = open_windows, least
        self._iterator: Iterator[Chunk] | None = None
        self._queue: SimpleQueue[_Source | None] | None = None
        self._waiting, self._full, self._ended = 0, False, False
        self._items: deque[Chunk | Exception] = deque()
        self._changed = threading.Condition()

    def begin(self, queue: SimpleQueue[_Source | None]) -> None:
        """Waits in a queue for its turns from now on."""
        self._queue = queue
        queue.put(self)

    def read_a_chunk(self) -> bool:
        """Reads on; False: it wants no turn for the present. In one thread at a time."""
        item = None if self._ended else self._next()
        with self._changed:
            if item is None or self._ended:
                self._iterator = None  # closes its file
                return False
            self._items.append(item)
            self._waiting += _windows_in(item)
            self._full = self._waiting >= self._least
            self._changed.notify_all()
            return not self._full and not isinstance(item, Exception)

    def get(self) -> Chunk | Exception:
        """Waits for what comes next."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._items))
            item = self._items.popleft()
            self._waiting -= _windows_in(item)
            if self._full and self._waiting < self._least and self._queue is not None:
                self._full = False
                self._queue.put(self)
            return item

    def end(self) -> None:
        """Reads no more."""
        self._ended = True

    def _next(self) -> Chunk | Exception:
        try:
            if self._iterator is None:
                self._iterator = self._open_windows()
            return next(self._iterator)
        except StopIteration:
            return RuntimeError("the stream of windows ended, and it must be endless")
        except Exception as error:  # raised again where the training loop can see it
            return error


def _windows_in(item: Chunk | Exception) -> int:
    return 0 if isinstance(item, Exception) else len(item[0])
