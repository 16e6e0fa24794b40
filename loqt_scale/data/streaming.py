"""The `TrainStream` of a data set that only goes forward.

Every rank reads the whole stream and keeps its own rows. That costs each rank the tokenization of all text, which a
background thread does ahead of the training step; in exchange no rank has to know of any other, and the order depends
on (seed, step) only, as for stored corpora.

A later step is reached by reading up to it. An earlier step cannot be reached. A run that goes on need not tokenize all
again: the reader says of each chunk where it began (`Place`), a checkpoint keeps that, the next reader starts there.
"""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
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

_CHUNKS_AHEAD = 8
_STEPS_KNOWN = 4  # a step may be taken back when the next one has been read
_STOP_CHECK_SECONDS = 0.1
_JOIN_SECONDS = 5.0

_Count = Annotated[int, Field(ge=0, lt=2**53)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid"))
class Place:
    """A point of an endless stream from which it can be read on.

    Args:
        epoch: Which pass over the data set.
        texts: Documents of this pass that lie before the point.
        tokens: Tokens that they gave.
        rest: Tokens before the point that are in no window yet.
        windows: Windows after the point that have been read.
    """

    epoch: _Count = 0
    texts: _Count = 0
    tokens: _Count = 0
    rest: Annotated[tuple[_Count, ...], Field(strict=False)] = ()
    windows: _Count = 0


Chunk = tuple[Int64Array, Place]
_Queue = queue.Queue[Chunk | Exception]


class StreamedSequences:
    """Sequences read from an endless iterator in a background thread.

    The thread starts with the first call of `sequences`, so that a run which only evaluates reads nothing.

    Args:
        open_windows: Starts the iterator at a place: (m, T + 1) int64 windows, m >= 1, each time with the place that
            they begin at; without end. Called in the thread.
        global_batch_size: B.
    """

    def __init__(self, open_windows: Callable[[Place], Iterator[Chunk]], *, global_batch_size: int) -> None:
        self._open_windows, self._batch_size = open_windows, global_batch_size
        self._queue: _Queue = queue.Queue(maxsize=_CHUNKS_AHEAD)
        self._reader: _Reader | None = None
        self._closed = False
        self._place = Place()
        self._begins: dict[int, Place] = {}  # where the last few steps begin
        self._pending: Int64Array | None = None
        self._error: Exception | None = None
        self._step = -1
        self._batch: Int64Array | None = None

    def sequences(self, step: int, start: int, stop: int) -> Batch:
        """See `TrainStream`. Steps must not decrease; one step may be asked for several times, in any ranges."""
        check_range(step, start, stop, self._batch_size)
        if step < self._step:
            raise ValueError(
                f"step {step} was asked for after step {self._step}, and a streamed data set only goes forward; build "
                "the corpus anew to go back (or download the data set and write data.files)"
            )
        while self._step < step:
            self._begins[self._step + 1] = self._place
            self._begins.pop(self._step + 1 - _STEPS_KNOWN, None)
            self._batch = self._next_batch()
            self._step += 1
        assert self._batch is not None
        return batch_of(self._batch[start:stop])

    def position(self, step: int | None = None) -> dict[str, Any]:
        """See `TrainStream`. A step that could not be read, or not wholly, begins where it did before that."""
        following = self._step + 1
        begins = {following: self._place} | self._begins
        return asdict(begins[following if step is None else step])

    def seek(self, step: int, position: dict[str, Any]) -> None:
        """See `TrainStream`."""
        assert self._reader is None, "read already"
        try:
            place = Place(**position)
        except (ValidationError, TypeError):
            raise UserError(f"{ascii(position)[:60]} is no place of a stream") from None
        if place.windows > step * self._batch_size:
            raise UserError(f"{place.windows} sequences were not read in {step} steps of {self._batch_size}")
        self._step, self._place = step - 1, place

    def close(self) -> None:
        """End the background thread; steps that were not read yet cannot be read any more."""
        self._closed = True
        if self._reader is not None:
            self._reader.end()

    def _next_batch(self) -> Int64Array:
        parts: list[Int64Array] = []
        missing = self._batch_size
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
        if self._closed:
            raise ValueError("this stream was closed; build the corpus anew to read on")
        skipped = 0
        if self._reader is None:
            self._reader = _Reader(partial(self._open_windows, replace(self._place, windows=0)), self._queue)
            skipped = self._place.windows  # of the first chunks, read before
            # Freed with its reader still running, the stream only asks it to stop. It must not wait for it: garbage
            # is collected at any moment, this thread may hold the import lock, and the reader may be importing.
            weakref.finalize(self, self._reader.stop.set)
        while True:
            item = self._queue.get()
            if isinstance(item, Exception):
                self._error = item
                raise item
            windows, place = item
            if skipped < len(windows):
                self._place = replace(place, windows=skipped)
                return windows[skipped:]
            skipped -= len(windows)


class _Reader:
    """The background thread and the event that stops it. It holds no `StreamedSequences`, so that one can be freed."""

    def __init__(self, open_windows: Callable[[], Iterator[Chunk]], chunks: _Queue) -> None:
        self.stop = threading.Event()
        arguments = (open_windows, chunks, self.stop)
        self._thread = threading.Thread(target=_read_ahead, args=arguments, name="data-stream", daemon=True)
        self._thread.start()
        # A daemon thread inside pyarrow while the interpreter tears down its modules would crash.
        atexit.register(self.end)

    def end(self) -> None:
        self.stop.set()
        self._thread.join(_JOIN_SECONDS)


def _read_ahead(open_windows: Callable[[], Iterator[Chunk]], chunks: _Queue, stop: threading.Event) -> None:
    try:
        for chunk in open_windows():
            if not _put(chunks, chunk, stop):
                return
        _put(chunks, RuntimeError("the stream of windows ended, and it must be endless"), stop)
    except Exception as error:  # raised again where the training loop can see it
        _put(chunks, error, stop)


def _put(chunks: _Queue, item: Chunk | Exception, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            chunks.put(item, timeout=_STOP_CHECK_SECONDS)
        except queue.Full:
            continue
        return True
    return False
