"""A rank's share that cannot be read: alone it ends at once, with others it goes on blank until all know."""

from __future__ import annotations

import pytest

from loqt_scale.data import Batch
from loqt_scale.errors import UserError
from loqt_scale.training.reading import ShareReader, UnreadableDataError, UnreadableTogetherError


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
