"""Pieces: every document once an epoch, whatever the files and streams; the numbers of streams and who shares them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loqt_scale.data.hub import Split
from loqt_scale.data.logical import ranks_that_share, stream_count, streams_read_twice
from loqt_scale.data.pieces import Pieces, cut_into_pieces


def rows_of(files: list[tuple[int, int]]) -> Iterator[dict[str, str]]:
    for number, rows in files:
        yield from ({"text": f"{number}-{row}"} for row in range(rows))


def cut(sizes: list[int], streams: int) -> Pieces:
    import datasets

    rows = datasets.IterableDataset.from_generator(rows_of, gen_kwargs={"files": list(enumerate(sizes))})
    return cut_into_pieces(Split(source="a", rows=rows, text_field="text"), streams=lambda files: streams, seed=3)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(1, 7))
def test_every_document_is_read_once_an_epoch(sizes: list[int], streams: int) -> None:
    """Files of uneven sizes, some empty, fewer or more than the streams."""
    pieces = cut(sizes, streams)
    expected = {f"{number}-{row}" for number, rows in enumerate(sizes) for row in range(rows)}
    for epoch in range(2):
        places = range(epoch * pieces.count, (epoch + 1) * pieces.count)
        read = Counter(text for place in places for _, texts in pieces.texts(place, 0) for text in texts)
        assert set(read) == expected and set(read.values()) <= {1}


def test_rows_are_shuffled_by_blocks_that_can_be_read_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loqt_scale.data.pieces.SHUFFLED_ROWS", 8)
    pieces = cut([20], 2)
    blocks = list(pieces.texts(0, 0))
    assert [row for row, _ in blocks] == [0, 4, 8]
    assert list(pieces.texts(0, 4)) == blocks[1:]
    assert any(texts != sorted(texts, key=lambda text: int(text[2:])) for _, texts in blocks)


@pytest.mark.parametrize(
    ("wanted", "batch", "files", "expected"),
    [(None, 512, 1024, 64), (None, 512, 1, 8), (None, 12, 1, 6), (None, 12, 12, 12), (None, 131, 999, 1), (4, 8, 1, 4)],
)
def test_streams_divide_the_batch(wanted: int | None, batch: int, files: int, expected: int) -> None:
    assert stream_count(wanted, batch, files) == expected


def test_who_shares_streams_evenly() -> None:
    assert ranks_that_share(12) == [1, 2, 3, 4, 6, 12]
    assert [streams_read_twice(12, 24, ranks) for ranks in (1, 2, 3, 4, 5, 6, 12, 24)] == [0, 0, 0, 0, 2, 0, 0, 12]
