"""A rank's share of each step's text, and what happens when it cannot be read."""

from __future__ import annotations

import time
from typing import NoReturn

import torch

from loqt_scale.data import Batch, TrainStream
from loqt_scale.errors import UserError, one_line
from loqt_scale.metrics import RateMeter, Reminder, Tell
from loqt_scale.strategies import Comm

LONG_WAIT = 0.1  # of a step's time
_EVERY = 50  # steps, as many as a `RateMeter` averages over


class UnreadableDataError(UserError):
    """A rank could not read its share of a step. Nobody has applied that step."""


class UnreadableTogetherError(UnreadableDataError):
    """The same, raised on all ranks at the same step."""


class ShareReader:
    """Reads this rank's sequences.

    A rank that fails to cannot leave alone: the others would wait for it in the next collective. So it goes on with
    blank sequences, makes its loss NaN, so that no rank applies the step, and raises a flag (`Flags.faults`); when the
    ranks read the flags, all of them end together (`fail`).

    Args:
        text: The training text.
        seq_len: T.
        alone: Raise at once: there are no other ranks, or their updates could not be kept from being applied.

    Attributes:
        fault: Why a share could not be read; None as long as all could.
        waited: Seconds that the last share took.
    """

    def __init__(self, text: TrainStream, seq_len: int, *, alone: bool) -> None:
        self._text, self._seq_len, self._alone = text, seq_len, alone
        self.fault: Exception | None = None
        self.waited = 0.0

    def read(self, step: int, start: int, stop: int) -> Batch:
        """Sequences [start, stop) of a step; blank ones from the first failure on. Local.

        Raises:
            UnreadableDataError: They cannot be read, and this rank is `alone`.
        """
        begin = time.perf_counter()
        try:
            if self.fault is None:
                return self._text.sequences(step, start, stop)
        except Exception as error:
            if self._alone:
                text = f"the data of step {step + 1} cannot be read: {one_line(error)}"
                raise UnreadableDataError(text) from error
            self.fault = error
        finally:
            self.waited = time.perf_counter() - begin
        blank = torch.zeros((stop - start, self._seq_len), dtype=torch.int64)
        return Batch(blank, blank)

    def fail(self, step: int, comm: Comm) -> NoReturn:
        """Raises UnreadableTogetherError, which names the ranks that could not read their share. Every rank."""
        reasons = enumerate(comm.gather_objects(None if self.fault is None else one_line(self.fault)))
        who = "; ".join(f"rank {rank}: {reason}" for rank, reason in reasons if reason is not None)
        raise UnreadableTogetherError(f"the data of step {step + 1} cannot be read: {who}") from self.fault


class WaitWatch:
    """Tells that this rank's text comes too slowly: all ranks wait for it, and metrics are those of rank 0.

    Args:
        rank: This one.
        tell: Takes a line for people.
    """

    def __init__(self, rank: int, tell: Tell) -> None:
        self._rank, self._reminder, self._steps = rank, Reminder(tell), 0

    def take(self, rates: RateMeter) -> None:
        """After each step. The first ones wait for the reading to begin, and do not count. Local."""
        self._steps += 1
        if self._steps % _EVERY or self._steps == _EVERY:
            return
        waited, seconds = rates.waited_per_step, rates.seconds_per_step
        if waited > LONG_WAIT * seconds:
            self._reminder.trouble(
                f"rank {self._rank} waits {waited:.2g} of {seconds:.2g} s a step for its text, and all ranks with it; "
                "give it more cores, or tokenize beforehand (data.files in place of data.dataset)"
            )
        else:
            self._reminder.over(f"rank {self._rank} waits for its text no longer")
