"""The `TrainStream` of a streamed data set, made of K logical streams so that ranks can share the reading.

Sequence i of a step's B is one of logical stream i K // B: the streams lie side by side in the global batch, B / K
sequences each. A rank's share of the batch is contiguous, so it needs a few neighbouring streams, and reads and
tokenizes these alone. Which sequence comes where depends on (seed, step), not on how many ranks there are. Where their
number N divides K, each stream is read by one rank; where it does not, neighbours read the stream at their border both.

A checkpoint holds the places of all K streams, so a run goes on with any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol

import torch
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from loqt_scale.data.batches import AnotherTextError, Batch, Portion, WholeBatch, check_range
from loqt_scale.data.streaming import Readers
from loqt_scale.errors import UserError
from loqt_scale.functional.shares import share

MOST_STREAMS = 64
"""Logical streams if `data.streams` says nothing: at most so many; each is a file that is open on its rank."""

_FEWEST_MOST = 8  # that of a data set of fewer files, each of which several streams have to read


class Stream(Protocol):
    """One logical stream, forward only; see `streaming.LogicalStream`."""

    @property
    def pieces(self) -> int:
        """Pieces of the data set that it has read."""

    def begin(self, readers: Readers | None = None) -> None:
        """Starts to read ahead, in threads that it shares with others."""

    def sequences(self, step: int, start: int, stop: int) -> Batch:
        """Sequences [start, stop) of this stream's in a step."""

    def position(self, step: int) -> dict[str, Any] | None:
        """Where a step begins; None: not known here."""

    def seek(self, step: int, position: dict[str, Any]) -> None:
        """Makes a step the next one."""

    def close(self) -> None:
        """Ends the reading."""


def stream_count(wanted: int | None, global_batch_size: int, files: int) -> int:
    """K: `data.streams`, or the greatest number up to 64 that divides B (up to 8 or the number of files, if fewer)."""
    if wanted is not None:
        return wanted
    most = min(MOST_STREAMS, max(files, _FEWEST_MOST), global_batch_size)
    return next(count for count in range(most, 0, -1) if global_batch_size % count == 0)


def ranks_that_share(streams: int) -> list[int]:
    """Numbers of ranks over which so many streams are shared out, each to one."""
    return [ranks for ranks in range(1, streams + 1) if streams % ranks == 0]


def streams_read_twice(streams: int, global_batch_size: int, ranks: int) -> int:
    """How many readings of a stream are more than one a stream, summed over the ranks."""
    per_step = global_batch_size // streams
    shares = (share(global_batch_size, rank, ranks) for rank in range(ranks))
    return sum(len(_touched(start, stop, per_step)) for start, stop in shares) - streams


@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid"))
class _Position:
    """Where all streams stand, as a checkpoint holds it."""

    streams: Annotated[int, Field(ge=1, lt=2**24)]
    text: str
    places: dict[str, dict[str, Any]]


class LogicalStreams:
    """See the module's docstring.

    Args:
        open_stream: Makes the logical stream of a number, at its beginning; of each step it gives as many sequences as
            `portion` has within that stream's B / K.
        streams: K, which divides B.
        text: Tells this text from another, e.g. in how many pieces it lies; kept in checkpoints.
        seq_len: T.
        global_batch_size: B.
        portion: Which sequences are this text's; default: all.
        pieces: In how many pieces it lies, of which each stream reads every K-th.
    """

    def __init__(
        self,
        open_stream: Callable[[int], Stream],
        *,
        streams: int,
        text: str,
        seq_len: int,
        global_batch_size: int,
        portion: Portion | None = None,
        pieces: int = 1,
    ) -> None:
        if global_batch_size % streams:
            raise UserError(
                f"{streams} logical streams do not divide train.global_batch_size {global_batch_size}; write a "
                "divisor of it in data.streams"
            )
        self.count = streams
        self._open_stream, self._text = open_stream, text
        self._seq_len, self._batch_size, self._pieces = seq_len, global_batch_size, pieces
        self._portion = portion or WholeBatch(global_batch_size)
        self._streams: dict[int, Stream] = {}
        self._readers = Readers()
        self._begin = 0  # the first step
        self._places: dict[str, dict[str, Any]] = {}  # where it begins
        self._next = 0

    def begin(self, step: int, start: int, stop: int) -> None:
        """See `TrainStream`: all streams at the same time, from the first step on that takes something of this text."""
        if self._portion.within(step, 0, self._batch_size):
            for number in _touched(start, stop, self._batch_size // self.count):
                self._stream(number).begin(self._readers)

    def sequences(self, step: int, start: int, stop: int) -> Batch:
        """See `TrainStream`. Steps must not decrease; one step may be asked for several times, in any ranges."""
        check_range(step, start, stop, self._batch_size)
        self.begin(step, start, stop)
        per_step = self._batch_size // self.count
        parts = []
        for number in _touched(start, stop, per_step):
            first = number * per_step
            begin, end = max(start, first), min(stop, first + per_step)
            skipped = self._portion.within(step, first, begin)
            wanted = self._portion.within(step, begin, end)
            # of none, too: each knows where a step begins
            parts.append(self._stream(number).sequences(step, skipped, skipped + wanted))
        self._next = max(self._next, step + 1)
        return _joined([part for part in parts if len(part.input_ids)], self._seq_len)

    def epochs(self, step: int) -> float:
        """See `TrainStream`: in whole pieces, mean of the streams that are read here."""
        read = [stream.pieces for stream in self._streams.values()]
        return sum(read) * self.count / (self._pieces * max(1, len(read)))

    def position(self, step: int | None = None) -> dict[str, Any]:
        """See `TrainStream`: the places of the streams that were read here; `join_positions` puts ranks' together."""
        step = self._next if step is None else step
        numbers = range(self.count) if step == self._begin else self._streams
        found = {str(number): (self._streams.get(number) or self._opened(number)).position(step) for number in numbers}
        places = {number: place for number, place in found.items() if place is not None}
        return {"streams": self.count, "text": self._text, "places": places}

    def seek(self, step: int, position: dict[str, Any]) -> None:
        """See `TrainStream`. Places of all streams are needed: which ones a rank reads depends on their number."""
        assert not self._streams, "read already"
        self._begin, self._places, self._next = step, self._checked(position), step
        for number in range(self.count):
            self._opened(number)  # each refuses what is no place of its own

    def close(self) -> None:
        """Ends the background threads; steps that were not read yet cannot be read any more."""
        for stream in self._streams.values():
            stream.close()
        self._readers.end()

    def _checked(self, position: Any) -> dict[str, dict[str, Any]]:
        if isinstance(position, dict) and "epoch" in position:
            raise AnotherTextError(
                "it was saved by an earlier version of loqt_scale, which read a streamed data set in another order; go "
                "on with that version, or train its weights as a new run: loqt-scale export --checkpoint CHECKPOINT "
                "--out DIR --dtype float32, then model.path: DIR, model.weights: pretrained, model.overrides: {}"
            )
        try:
            found = _Position(**position)
        except (ValidationError, TypeError):
            raise UserError(f"{ascii(position)[:60]} is no place of logical streams") from None
        if found.text == self._text and found.streams != self.count:
            raise AnotherTextError(
                f"the checkpoint was saved with {found.streams} logical streams, and now there are {self.count}; write "
                f"data.streams: {found.streams} to go on, or checkpoint.resume: never to start anew"
            )
        if (found.streams, found.text) != (self.count, self._text):
            raise AnotherTextError(
                f"the checkpoint was saved with {found.streams} logical streams of a data set of {found.text}, and "
                f"now there are {self.count} of {self._text}; put the old files back to go on, or write "
                "checkpoint.resume: never to start anew"
            )
        if set(found.places) != {str(number) for number in range(self.count)}:
            raise UserError(f"places of {len(found.places)} logical streams are not those of {self.count}")
        return found.places

    def _stream(self, number: int) -> Stream:
        if number not in self._streams:
            self._streams[number] = self._opened(number)
        return self._streams[number]

    def _opened(self, number: int) -> Stream:
        stream = self._open_stream(number)
        if self._places:
            stream.seek(self._begin, self._places[str(number)])
        return stream


def join_positions(positions: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The position of a run from those of its ranks, each of which knows the streams that it has read."""
    first = positions[0]
    if first is not None and "sources" in first:
        parts = {name: join_positions([(one or {})["sources"][name] for one in positions]) for name in first["sources"]}
        return {"sources": parts}
    if first is None or "places" not in first:
        return first
    places: dict[str, Any] = {}
    for position in positions:
        places |= (position or {})["places"]
    assert len(places) == first["streams"], "a stream that no rank has read"
    return first | {"places": {number: places[number] for number in sorted(places, key=int)}}


def _touched(start: int, stop: int, per_step: int) -> range:
    """Streams whose sequences lie in [start, stop) of a batch."""
    return range(start // per_step, -(-stop // per_step)) if start < stop else range(0)


def _joined(parts: Sequence[Batch], seq_len: int) -> Batch:
    if not parts:
        nothing = torch.empty((0, seq_len), dtype=torch.int64)
        return Batch(nothing, nothing)
    return Batch(torch.cat([part.input_ids for part in parts]), torch.cat([part.labels for part in parts]))
