"""Streams: the same batches however they are asked for, forward only, errors where the loop sees them."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Iterator
from itertools import count

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loqt_scale.data.streaming import Chunk, LogicalStream, Place

T = 2


def windows(sizes: list[int], place: Place) -> Iterator[Chunk]:
    """Endless windows in chunks of these sizes, again and again; window i starts with token i T.

    A place counts the chunks before it as texts, their windows as rows.
    """
    assert place.windows == 0, "skipping is not the reader's affair"
    first = place.row
    for chunk in count(place.texts):
        starts = np.arange(first, first + sizes[chunk % len(sizes)]) * T
        yield starts[:, None] + np.arange(T + 1), Place(texts=chunk, row=first)
        first += len(starts)


def stream(batch_size: int, sizes: list[int] | None = None) -> LogicalStream:
    return LogicalStream(lambda place: windows(sizes or [3], place), per_step=batch_size)


def numbers(made: LogicalStream, step: int, start: int, stop: int) -> list[int]:
    return [int(first) // T for first in made.sequences(step, start, stop).input_ids[:, 0]]


def stream_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "data-stream"]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 5))
def test_batches_are_consecutive_and_skipping_consumes(batch_size: int, sizes: list[int], step: int) -> None:
    made = stream(batch_size, sizes)
    expected = list(range(step * batch_size, (step + 1) * batch_size))
    assert numbers(made, step, 0, batch_size) == expected
    half = batch_size // 2
    assert numbers(made, step, half, batch_size) + numbers(made, step, 0, half) == expected[half:] + expected[:half]
    assert numbers(made, step + 1, 0, 1) == [expected[-1] + 1]
    made.close()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9),
    st.lists(st.integers(1, 7), min_size=1, max_size=4),
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
)
def test_a_stream_goes_on_from_its_position(batch_size: int, sizes: list[int], stops: list[int]) -> None:
    """Read some steps, keep the position as a checkpoint does, begin anew; several times."""
    step, made = 0, stream(batch_size, sizes)
    for steps in stops:
        for _ in range(steps):
            numbers(made, step, 0, 0)
            step += 1
        position = json.loads(json.dumps(made.position(step)))
        made.close()
        made = stream(batch_size, sizes)
        made.seek(step, position)
        assert json.loads(json.dumps(made.position(step))) == position
    assert numbers(made, step, 0, batch_size) == list(range(step * batch_size, (step + 1) * batch_size))
    made.close()


def test_labels_are_the_next_tokens() -> None:
    made = stream(2)
    batch = made.sequences(0, 0, 2)
    assert batch.input_ids.dtype == torch.int64
    assert torch.equal(batch.labels, batch.input_ids + 1)
    made.close()


def test_going_back_is_refused() -> None:
    made = stream(2)
    made.sequences(3, 0, 1)
    with pytest.raises(ValueError, match=r"step 2 was asked for after step 3.*only goes forward"):
        made.sequences(2, 0, 1)
    made.close()


def test_ranges_outside_the_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="do not exist"):
        stream(2).sequences(0, 0, 3)


def test_errors_of_the_reader_reach_the_caller_every_time() -> None:
    def failing(place: Place) -> Iterator[Chunk]:
        yield next(windows([1], place))
        raise ValueError("no column")

    made = LogicalStream(failing, per_step=1)
    assert numbers(made, 0, 0, 1) == [0]
    for _ in range(2):
        with pytest.raises(ValueError, match="no column"):
            made.sequences(1, 0, 1)


def test_a_stream_that_ends_is_an_error() -> None:
    made = LogicalStream(lambda place: iter([]), per_step=1)
    with pytest.raises(RuntimeError, match="endless"):
        made.sequences(0, 0, 1)


def test_reading_ahead_is_bounded() -> None:
    read = count()
    latest = 0

    def counting(place: Place) -> Iterator[Chunk]:
        nonlocal latest
        for chunk in windows([1], place):
            latest = next(read)
            yield chunk

    made = LogicalStream(counting, per_step=1)
    made.sequences(0, 0, 1)
    time.sleep(0.2)
    assert 2 <= latest <= 12
    made.close()


def test_thread_starts_late_and_ends_with_its_owner() -> None:
    gc.collect()
    time.sleep(0.3)  # readers of the tests before this one
    before = len(stream_threads())
    made = stream(1)
    assert len(stream_threads()) == before
    made.sequences(0, 0, 1)
    assert len(stream_threads()) == before + 1
    del made
    gc.collect()
    deadline = time.monotonic() + 5
    while len(stream_threads()) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(stream_threads()) == before


def test_a_closed_stream_says_so() -> None:
    made = stream(1, [1])
    made.sequences(0, 0, 1)
    made.close()
    with pytest.raises(ValueError, match="was closed"):
        made.sequences(1, 0, 1)


@pytest.mark.parametrize(
    "position",
    [None, [], 7, "x", {"piece": "1"}, {"piece": -1}, {"texts": 2**60}, {"rest": [-1]}, {"other": 1}, {"windows": 7}],
)
def test_a_position_that_is_none_is_refused(position: object) -> None:
    """It may come from a stranger's checkpoint: nor can seven sequences have been read in two steps of three."""
    made = stream(3)
    with pytest.raises(ValueError, match=r"is no place of a stream|7 sequences were not read in 2 steps of 3"):
        made.seek(2, position)  # type: ignore[arg-type]
