"""One logical stream: sequences that a background thread reads ahead, forward only.

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
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from loqt_scale.data.batches import Batch, batch_of, check_range
from loqt_scale.data.packing import Int64Array
from loqt_scale.errors import UserError

_CHUNKS_AHEAD, _STEPS_AHEAD = 4, 2  # the thread waits when it is ahead by both
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


class LogicalStream:
    """Sequences read from an endless iterator in a background thread.

    The thread starts with the first call of `begin` or `sequences`, so that a run which only evaluates reads nothing.

    Args:
        open_windows: Starts the iterator at a place: (m, T + 1) int64 windows, m >= 1, each time with the place that
            they begin at; without end. Called in the thread.
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
        self._chunks = _Chunks(_STEPS_AHEAD * per_step)
        self._reader: _Reader | None = None
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

    def begin(self) -> None:
        """Starts to read ahead, if it has not begun."""
        if self._closed:
            raise ValueError("this stream was closed; build the corpus anew to read on")
        if self._reader is None:
            self._skipped = self._place.windows
            self._reader = _Reader(partial(self._open_windows, replace(self._place, windows=0)), self._chunks)
            # Freed with its reader still running, the stream only asks it to stop. It must not wait for it: garbage
            # is collected at any moment, this thread may hold the import lock, and the reader may be importing.
            weakref.finalize(self, self._chunks.end)

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
        assert self._reader is None, "read already"
        try:
            place = Place(**position)
        except (ValidationError, TypeError):
            raise UserError(f"{ascii(position)[:60]} is no place of a stream") from None
        if place.windows > step * self._per_step:
            raise UserError(f"{place.windows} sequences were not read in {step} steps of {self._per_step}")
        self._step, self._place = step - 1, place

    def close(self) -> None:
        """End the background thread; steps that were not read yet cannot be read any more."""
        self._closed = True
        if self._reader is not None:
            self._reader.end()

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
        while True:
            item = self._chunks.get()
            if isinstance(item, Exception):
                self._error = item
                raise item
            windows, place = item
            if self._skipped < len(windows):
                skipped, self._skipped = self._skipped, 0
                self._place = replace(place, windows=skipped)
                return windows[skipped:]
            self._skipped -= len(windows)


class _Chunks:
    """What the thread has read and nobody has taken: a queue that is full at so many chunks and so many windows.

    It is not a `queue.Queue`: a thread that waits there cannot be told to stop, and would have to look every so often.
    """

    def __init__(self, windows: int) -> None:
        self._least, self._waiting, self._ended = windows, 0, False
        self._items: deque[Chunk | Exception] = deque()
        self._changed = threading.Condition()  # reentrant: garbage may be collected, and end() called, inside

    def put(self, item: Chunk | Exception) -> bool:
        """Waits for room; False: it has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or not self._full())
            self._items.append(item)
            self._waiting += _windows_in(item)
            self._changed.notify_all()
            return not self._ended

    def get(self) -> Chunk | Exception:
        """Waits for an item."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._items))
            item = self._items.popleft()
            self._waiting -= _windows_in(item)
            self._changed.notify_all()
            return item

    def end(self) -> None:
        """Lets who waits in `put` go."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _full(self) -> bool:
        return len(self._items) >= _CHUNKS_AHEAD and self._waiting >= self._least


def _windows_in(item: Chunk | Exception) -> int:
    return 0 if isinstance(item, Exception) else len(item[0])


class _Reader:
    """The background thread. It holds no `LogicalStream`, so that one can be freed."""

    def __init__(self, open_windows: Callable[[], Iterator[Chunk]], chunks: _Chunks) -> None:
        self._chunks = chunks
        self._thread = threading.Thread(
            target=_read_ahead, args=(open_windows, chunks), name="data-stream", daemon=True
        )
        self._thread.start()
        # A daemon thread inside pyarrow while the interpreter tears down its modules would crash.
        atexit.register(self.end)

    def end(self) -> None:
        self._chunks.end()
        self._thread.join(_JOIN_SECONDS)


def _read_ahead(open_windows: Callable[[], Iterator[Chunk]], chunks: _Chunks) -> None:
    try:
        for chunk in open_windows():
            if not chunks.put(chunk):
                return
        chunks.put(RuntimeError("the stream of windows ended, and it must be endless"))
    except Exception as error:  # raised again where the training loop can see it
        chunks.put(error)
