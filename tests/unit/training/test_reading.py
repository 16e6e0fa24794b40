"""A rank's share that cannot be read: alone it ends at once, with others it goes on blank until all know."""

from __future__ import annotations

import time

import pytest

from loqt_scale.data import Batch
from loqt_scale.errors import UserError
from loqt_scale.metrics import RateMeter
from loqt_scale.training.reading import ShareReader, UnreadableDataError, UnreadableTogetherError, WaitWatch


class Unplugged:
    """Training text on a disk that is gone."""

    def sequences(self, step: int, start: int, stop: int) -> Batch:
        raise OSError(5, "Input/output error")


def test_alone_the_error_is_this_ranks_only() -> None:
    with pytest.raises(UnreadableDataError, match=r"the data of step 8 cannot be read: .*Input/output error") as caught:
        ShareReader(Unplugged(), 16, alone=True).read(7, 0, 4)
    assert isinstance(caught.value, UserError) and not isinstance(caught.value, UnreadableTogetherError)


def test_beside_others_blank_sequences_take_their_place_from_then_on() -> None:
    reader = ShareReader(Unplugged(), 16, alone=False)
    for step in (7, 8):
        batch = reader.read(step, 2, 5)
        assert batch.input_ids.shape == batch.labels.shape == (3, 16) and not batch.input_ids.any()
    assert isinstance(reader.fault, OSError)


def test_a_rank_that_waits_for_its_text_says_so_once_and_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    meter, told = RateMeter(), list[str]()
    watch = WaitWatch(3, told.append)

    def steps(count: int, waited: float) -> list[str]:
        nonlocal now
        told.clear()
        for _ in range(count):
            now += 0.5
            meter.tick(1000, waited)
            watch.take(meter)
        return [*told]

    assert steps(50, 0.4) == []  # the reading begins
    assert steps(50, 0.04) == []
    (line,) = steps(50, 0.2)
    assert "rank 3 waits 0.2 of 0.5 s a step for its text" in line and "data.files in place of data.dataset" in line
    assert ["times by now" in line for line in steps(350, 0.2)] == [True, True, True]  # the 2nd, 4th, 8th time
    assert steps(100, 0.0) == ["rank 3 waits for its text no longer"]
