"""Which sequences a training step reads.

A run's data order has to be a function of (seed, step) alone: then a run that is resumed, or moved to another number of
ranks, goes on with exactly the text it would have read. So nothing here knows about ranks. A step has a *global* batch
of B sequences, numbered 0 to B - 1, and whoever needs some of them asks for `sequences(step, start, stop)`.

For a stored corpus of n sequences, sequence i of step s is number g = s B + i of an endless list: epoch g // n, place
g % n in that epoch's permutation. (One of several texts has its own list; a `Portion` says how far it is in it.) A
batch may thus straddle two epochs, and any step can be read at once. Streamed data sets, which only go forward, are in
`streaming.py`.

B = global_batch_size, T = seq_len, N = sequences in a share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from loqt_scale.data.packing import Int64Array, Tokens, complete_windows, windows_at
from loqt_scale.errors import UserError
from loqt_scale.functional.seeding import epoch_keys


class AnotherTextError(UserError):
    """The text is not the one that a position belongs to. Nothing is damaged."""


class Portion(Protocol):
    """Which sequences of the global batches come from one text."""

    def before(self, step: int) -> int:
        """How many of all steps before."""

    def within(self, step: int, start: int, stop: int) -> int:
        """How many of [start, stop) of a step's global batch."""


@dataclass(frozen=True)
class WholeBatch:
    """The `Portion` of the only text: all B of each step."""

    size: int

    def before(self, step: int) -> int:
        """See `Portion`."""
        return step * self.size

    def within(self, step: int, start: int, stop: int) -> int:
        """See `Portion`."""
        return stop - start


@dataclass(frozen=True)
class Batch:
    """Sequences to train on or to score.

    Args:
        input_ids: (N, T) int64.
        labels: (N, T) int64, shifted already: labels[:, t] is the token after input_ids[:, t]; -100 is not counted.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor


class TrainStream(Protocol):
    """The training sequences of a run."""

    def begin(self, step: int, start: int, stop: int) -> None:
        """Starts to read what `sequences` will be asked for, where that takes time; does not wait for it."""

    def sequences(self, step: int, start: int, stop: int) -> Batch:
        """Return sequences [start, stop) of the global batch of `step`.

        Args:
            step: Optimizer step, from 0.
            start: First sequence, 0 <= start.
            stop: One past the last, start <= stop <= B.

        Returns:
            `stop - start` sequences; of one of several texts, those of them that are its own (see `Portion`).

        Raises:
            ValueError: The range is not within the global batch; or the stream only goes forward and is past `step`.
        """

    def epochs(self, step: int) -> float:
        """How many times the text has been read before a step; one that only goes forward: by now."""

    def position(self, step: int | None = None) -> dict[str, Any] | None:
        """What `seek` needs to go on with `step`, plain data; None if it needs nothing.

        Args:
            step: The step after the last one that was read (default), or one of the last few before it.
        """

    def seek(self, step: int, position: dict[str, Any]) -> None:
        """Makes `step` the next one, on a stream that has not been read yet.

        Args:
            step: The step after the last one that had been read.
            position: What `position` returned then.

        Raises:
            AnotherTextError: It is one of another text.
            ValueError: It is none of this stream's.
        """


class StoredSequences:
    """The `TrainStream` of a token stream in memory or on disk: any step at any time.

    Args:
        tokens: (n,) training tokens, of any integer dtype.
        seq_len: T.
        seed: Seed of the order.
        global_batch_size: B.
        digest: Of the tokens' content, if it is known.
        portion: Which sequences are this text's; default: all.

    Raises:
        ValueError: Fewer tokens than one sequence needs (T + 1).
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        seq_len: int,
        seed: int,
        global_batch_size: int,
        digest: str | None = None,
        portion: Portion | None = None,
    ) -> None:
        self._count = complete_windows(len(tokens), seq_len)
        if self._count == 0:
            raise UserError(
                f"corpus smaller than one sequence: {len(tokens)} training tokens, and data.seq_len {seq_len} needs "
                f"{seq_len + 1}; write a smaller data.seq_len or more text in data.files"
            )
        self._tokens, self._seq_len, self._seed, self._batch_size = tokens, seq_len, seed, global_batch_size
        self._digest, self._portion = digest, portion or WholeBatch(global_batch_size)
        self._orders: dict[int, npt.NDArray[np.integer]] = {}

    def begin(self, step: int, start: int, stop: int) -> None:
        """See `TrainStream`: nothing."""

    def sequences(self, step: int, start: int, stop: int) -> Batch:
        """See `TrainStream`."""
        check_range(step, start, stop, self._batch_size)
        first = self._portion.before(step) + self._portion.within(step, 0, start)
        places = first + np.arange(self._portion.within(step, start, stop), dtype=np.int64)
        epochs = places // self._count
        windows = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            windows[chosen] = self._order(int(epoch))[places[chosen] % self._count]
        return batch_of(windows_at(self._tokens, windows, self._seq_len))

    def epochs(self, step: int) -> float:
        """See `TrainStream`."""
        return self._portion.before(step) / self._count

    def position(self, step: int | None = None) -> dict[str, Any] | None:
        """See `TrainStream`: only which text it was."""
        return None if self._digest is None else {"text": self._digest}

    def seek(self, step: int, position: dict[str, Any]) -> None:
        """See `TrainStream`: any step can be read, but of the same text."""
        known = position.get("text") if isinstance(position, dict) else None
        if self._digest is not None and known not in (None, self._digest):
            raise AnotherTextError(
                "the training text is another one than when the checkpoint was saved (its tokens differ); put the old "
                "files back to go on, or write checkpoint.resume: never to start anew"
            )

    def _order(self, epoch: int) -> npt.NDArray[np.integer]:
        if epoch not in self._orders:
            # Shares of one step may straddle two epochs, so the order before this one is kept; older ones are not.
            self._orders = {old: order for old, order in self._orders.items() if old == epoch - 1}
            self._orders[epoch] = epoch_order(self._count, self._seed, epoch)
        return self._orders[epoch]


def epoch_order(count: int, seed: int, epoch: int) -> npt.NDArray[np.integer]:
    """Return the order in which an epoch reads its sequences.

    It sorts random keys, rather than calling `Generator.permutation`, which may change from release to release.

    Args:
        count: Number of sequences n.
        seed: Seed of the run, 0 or more.
        epoch: From 0.

    Returns:
        (n,) a permutation of 0 .. n - 1, int64, or uint32 where that holds n.
    """
    order = np.argsort(epoch_keys(count, seed, epoch), kind="stable")
    return order.astype(np.uint32) if count <= 2**32 else order


def batch_of(windows: Int64Array) -> Batch:
    """Split windows (N, T + 1) int64 into inputs and the labels one token later."""
    return Batch(
        input_ids=torch.from_numpy(np.ascontiguousarray(windows[:, :-1])),
        labels=torch.from_numpy(np.ascontiguousarray(windows[:, 1:])),
    )


def check_range(step: int, start: int, stop: int, global_batch_size: int) -> None:
    """Raise ValueError unless [start, stop) lies within the global batch of a step."""
    if step < 0 or not 0 <= start <= stop <= global_batch_size:
        raise ValueError(
            f"sequences [{start}, {stop}) of step {step} do not exist; steps start at 0 and a global batch is "
            f"[0, {global_batch_size})"
        )
