"""Packing: every token is predicted exactly once, whatever the documents' lengths."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loqt_scale.data.packing import (
    IGNORED_LABEL,
    complete_windows,
    cut_windows,
    evaluation_windows,
    join_documents,
    text_groups,
    windows_at,
)

EOS = 10**9
SEQ_LENS = st.integers(2, 9)
LENGTHS = st.lists(st.integers(0, 25), min_size=1, max_size=8)


def distinct_tokens(lengths: list[int]) -> np.ndarray:
    """Documents of these lengths, joined, in which every token (ends of text too) is its own position."""
    return np.arange(len(join_documents([[7] * n for n in lengths], EOS)))


def test_an_end_of_text_follows_every_document() -> None:
    assert join_documents([[1, 2], [], [3]], EOS).tolist() == [1, 2, EOS, EOS, 3, EOS]
    assert join_documents([], EOS).dtype == np.int64


@given(LENGTHS, SEQ_LENS)
def test_training_predicts_each_token_once_up_to_the_incomplete_window(lengths: list[int], seq_len: int) -> None:
    tokens = distinct_tokens(lengths)
    count = complete_windows(len(tokens), seq_len)
    windows = windows_at(tokens, np.arange(count), seq_len)
    inputs, labels = windows[:, :-1], windows[:, 1:]
    assert inputs.shape == labels.shape == (count, seq_len)
    assert inputs.ravel().tolist() == list(range(count * seq_len))
    assert labels.ravel().tolist() == list(range(1, count * seq_len + 1))
    assert len(tokens) - 1 - count * seq_len < seq_len  # less than a window is dropped


@given(LENGTHS, SEQ_LENS)
def test_evaluation_predicts_every_token_but_the_first_once(lengths: list[int], seq_len: int) -> None:
    tokens = distinct_tokens([*lengths, 1])
    inputs, labels = evaluation_windows(tokens, seq_len, max_windows=1000, pad_id=EOS)
    counted = labels != IGNORED_LABEL
    assert labels[counted].tolist() == list(range(1, len(tokens)))
    assert (inputs[counted] == labels[counted] - 1).all()
    assert (inputs[~counted] == EOS).all()


@given(st.integers(2, 300), SEQ_LENS, st.integers(1, 12))
def test_evaluation_keeps_at_most_so_many_windows_spread_over_the_stream(n: int, seq_len: int, limit: int) -> None:
    inputs, labels = evaluation_windows(np.arange(n), seq_len, max_windows=limit, pad_id=0)
    total = -(-(n - 1) // seq_len)
    assert len(inputs) == len(labels) == min(total, limit)
    firsts = (inputs[:, 0] // seq_len).tolist()
    assert firsts == sorted(set(firsts))
    if limit > 1:
        assert firsts[0] == 0 and firsts[-1] == total - 1


def test_evaluation_of_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="predicts nothing"):
        evaluation_windows(np.arange(1), 4, 10, 0)


@given(st.lists(st.integers(0, 20), max_size=12), SEQ_LENS)
def test_a_stream_in_chunks_has_the_windows_of_the_whole(sizes: list[int], seq_len: int) -> None:
    tokens = np.arange(sum(sizes))
    ends = np.cumsum([0, *sizes])
    pieces, rest = [np.empty((0, seq_len + 1), np.int64)], np.empty(0, np.int64)
    for start, stop in pairwise(ends):
        piece, rest = cut_windows(np.concatenate([rest, tokens[start:stop]]), seq_len)
        pieces.append(piece)
        assert len(rest) <= seq_len
    streamed = np.concatenate(pieces)
    whole = windows_at(tokens, np.arange(complete_windows(len(tokens), seq_len)), seq_len)
    assert (streamed == whole).all() and streamed.shape == whole.shape


@given(st.lists(st.text(max_size=30)), st.integers(1, 40))
def test_groups_hold_every_document_in_order(documents: list[str], max_chars: int) -> None:
    groups = list(text_groups(documents, max_chars))
    assert [document for group in groups for document in group] == documents
    assert all(group and sum(map(len, group[:-1])) < max_chars for group in groups)
