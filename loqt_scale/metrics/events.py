"""TensorBoard's event files, written by tensorboard's own record writer.

Its `SummaryWriter` hands events to a thread that a full disk ends, and with it every event that comes later; so the
events go through a `LastingFile` instead.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from loqt_scale.metrics.lasting import LastingFile
from loqt_scale.metrics.reminder import Tell

_FORMAT = "brain.Event:2"
_NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\.", re.ASCII)


class EventFile:
    """One event file, `events.out.tfevents.TIME.HOST.PID.0`.

    Args:
        folder: Where it is made; the folder too.
        purge_step: From this step on TensorBoard forgets what earlier files say; None: nothing.
        tell: Takes a line for people.

    Raises:
        ImportError: tensorboard is not installed.
        OSError: It cannot be made.
    """

    def __init__(self, folder: Path, purge_step: int | None, tell: Tell) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise ImportError("metrics need tensorboard; run: pip install tensorboard") from error
        self._event, self._session = event_pb2.Event, event_pb2.SessionLog
        self._summary = summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        self._file = LastingFile(folder / _file_name(folder), tell)
        self._records = RecordWriter(self._file)
        self._ended: object = None
        self._begin(purge_step)

    def _begin(self, purge_step: int | None) -> None:
        self._add(file_version=_FORMAT, step=purge_step or 0)
        if purge_step is not None:
            self._add(session_log=self._session(status=self._session.START), step=purge_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars of one step, one event for all of them."""
        scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(summary=self._summary(value=scalars), step=step)

    def describe(self, hyperparameters: Mapping[str, object], metrics: Iterable[str], step: int) -> None:
        """Puts the run into TensorBoard's table of runs (HParams).

        torch's `SummaryWriter.add_hparams` does this in a folder of its own, which is one more run to look at.

        Args:
            hyperparameters: What it is compared by.
            metrics: Names of scalars, whose last values are its columns.
            step: From which this file speaks.
        """
        from torch.utils.tensorboard.summary import hparams

        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in hyperparameters.items()
        }
        experiment, begun, self._ended = hparams(plain, dict.fromkeys(metrics, 0.0))
        for summary in (experiment, begun):
            self._add(summary=summary, step=step)

    def succeeded(self, step: int) -> None:
        """Marks the run as finished in that table; it has been described."""
        self._add(summary=self._ended, step=step)

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._file.close()

    def _add(self, **fields: object) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())


def _file_name(folder: Path) -> str:
    """A name after all that are there: TensorBoard reads files in the order of their names, and clocks are set back."""
    times = (int(found[1]) for found in map(_NAME.match, os.listdir(folder)) if found)
    begun = max(int(time.time()), 1 + max(times, default=0))
    return f"events.out.tfevents.{begun:010d}.{socket.gethostname()}.{os.getpid()}.0"
