"""The order of stored sequences: a permutation per epoch, a function of (seed, step) only."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loqt_scale.data.batches import StoredSequences, epoch_order
from loqt_scale.errors import UserError

T = 3
GOLDEN_ORDER = [0, 3, 7, 5, 1, 2, 6, 4]


def stream(count: int, batch_size: int, seed: int = 0) -> StoredSequences:
    """`count` sequences; sequence i starts with token i T."""
    return StoredSequences(
        np.arange(count * T + 1, dtype=np.uint16), seq_len=T, seed=seed, global_batch_size=batch_size
    )


def numbers(made: StoredSequences, step: int, start: int, stop: int) -> list[int]:
    return [int(first) // T for first in made.sequences(step, start, stop).input_ids[:, 0]]


def test_shapes_dtypes_and_shift() -> None:
    batch = stream(5, 4).sequences(0, 1, 3)
    assert batch.input_ids.shape == batch.labels.shape == (2, T)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert torch.equal(batch.labels, batch.input_ids + 1)
    assert batch.input_ids.is_contiguous() and batch.labels.is_contiguous()
    assert stream(5, 4).sequences(0, 2, 2).input_ids.shape == (0, T)


@given(st.integers(1, 500), st.integers(0, 2**40), st.integers(0, 50))
def test_order_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    order = epoch_order(count, seed, epoch)
    assert sorted(order.tolist()) == list(range(count))
    assert (order == epoch_order(count, seed, epoch)).all()


def test_order_is_the_same_in_every_release() -> None:
    assert epoch_order(8, 0, 0).tolist() == GOLDEN_ORDER


def test_orders_of_seeds_and_epochs_differ() -> None:
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(st.integers(1, 40), st.integers(1, 23), st.integers(0, 30), st.data())
def test_shares_of_any_number_of_ranks_concatenate_to_the_batch(
    count: int, batch_size: int, step: int, data: st.DataObject
) -> None:
    made = stream(count, batch_size)
    cuts = sorted(data.draw(st.lists(st.integers(0, batch_size), max_size=4)))
    edges = [0, *cuts, batch_size]
    shares = [numbers(stream(count, batch_size), step, a, b) for a, b in pairwise(edges)]
    assert [number for share in shares for number in share] == numbers(made, step, 0, batch_size)


@given(st.integers(1, 20), st.integers(1, 45), st.integers(0, 5))
def test_each_epoch_reads_each_sequence_once_even_inside_a_batch(count: int, batch_size: int, seed: int) -> None:
    made = stream(count, batch_size, seed)
    steps = -(-3 * count // batch_size)
    read = [number for step in range(steps) for number in numbers(made, step, 0, batch_size)]
    for epoch in range(3):
        assert sorted(read[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_any_step_at_any_time() -> None:
    made = stream(7, 4)
    forward = [numbers(made, step, 0, 4) for step in range(12)]
    backward = [numbers(made, step, 0, 4) for step in reversed(range(12))]
    assert forward == backward[::-1]


def test_order_does_not_depend_on_the_batch_size() -> None:
    small, large = stream(10, 2), stream(10, 6)
    assert [n for step in range(9) for n in numbers(small, step, 0, 2)] == [
        n for step in range(3) for n in numbers(large, step, 0, 6)
    ]


def test_corpus_smaller_than_one_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"smaller than one sequence: 3 training tokens, .*data\.seq_len 3 needs 4"):
        StoredSequences(np.arange(T), seq_len=T, seed=0, global_batch_size=1)


@pytest.mark.parametrize(("step", "start", "stop"), [(-1, 0, 1), (0, -1, 1), (0, 2, 1), (0, 0, 5)])
def test_ranges_outside_the_batch_are_refused(step: int, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="do not exist"):
        stream(9, 4).sequences(step, start, stop)


def test_a_run_goes_on_with_the_text_that_it_began_with() -> None:
    def stream(digest: str | None) -> StoredSequences:
        return StoredSequences(np.arange(100), seq_len=T, seed=0, global_batch_size=1, digest=digest)

    position = stream("abc").position()
    stream("abc").seek(3, position or {})
    stream(None).seek(3, position or {})
    with pytest.raises(UserError, match=r"training text is another one .*put the old files back"):
        stream("abd").seek(3, position or {})
