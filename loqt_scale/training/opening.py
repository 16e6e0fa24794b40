"""A run's folder while a job works in it: locked, its start decided, prepared, and marked when the run is over.

    lock -> decide where the run starts (read only) -> prepare: what must make room is moved, never removed -> finish

Rank 0 does it and tells the others, errors too, so all ranks start from the same place or none does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import psutil

from loqt_scale.checkpoint import (
    CHECKPOINTS,
    Begun,
    CheckpointFolder,
    Finished,
    LineChange,
    Start,
    decide_start,
    identity,
    read_manifest,
)
from loqt_scale.config import RunConfig
from loqt_scale.config.yaml import dump_run_config
from loqt_scale.errors import UnwritableError, advice_on, reason_of
from loqt_scale.metrics import replay
from loqt_scale.process import pids
from loqt_scale.process.environment import slurm_job
from loqt_scale.strategies import Comm
from loqt_scale.training.rundir import holds_run, make_room, prepare_run_dir
from loqt_scale.training.runlock import LOCK, RunLock

T = TypeVar("T")


class OpenRun:
    """The folder of a run, open for this job; a context of every rank.

    Args:
        config: The run.
        comm: The ranks.
        tell: Takes a line for people.

    Raises:
        RunInUse: On entry, on all ranks: another job works in the folder.
        CheckpointError: On entry, on all ranks: see `decide_start`.
        OSError: On entry, on all ranks: the folder cannot be made or written to.
    """

    def __init__(self, config: RunConfig, comm: Comm, *, tell: Callable[[str], None]) -> None:
        self._config, self._comm, self._tell = config, comm, tell
        self._run_dir = Path(config.train.run_dir)
        self._folder = CheckpointFolder(self._run_dir / CHECKPOINTS)
        self._made: list[Path] = []
        self._lock: RunLock | None = None
        self.start: Start

    def __enter__(self) -> Self:
        try:
            self.start = on_main(self._comm, self._open)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def prepare(self) -> None:
        """Makes the folder ready for the run that starts as decided. Every rank.

        Raises:
            OSError: On all ranks; see `make_room`.
            CheckpointError: On all ranks: a checkpoint of another line cannot be moved.
        """
        on_main(self._comm, self._prepare)

    @property
    def place(self) -> Path | None:
        """Where the run's own checkpoint that it goes on from lies after `prepare`; None: it is another run's, or none.

        One of a line that had been set aside has been brought back.
        """
        own = self.start.own
        return None if own is None else self._folder.root / own.name

    def finish(self, loss_before: float, loss_after: float) -> None:
        """Marks the run as over, if its last step is saved. Every rank; rank 0 acts.

        Raises:
            PermissionError: On all ranks: the mark cannot be written.
        """
        on_main(self._comm, lambda: self._mark(loss_before, loss_after))

    def _mark(self, loss_before: float, loss_after: float) -> None:
        newest, steps = self._folder.latest(), self._config.train.steps
        if newest is None or read_manifest(newest).step != steps:
            self._tell(f"the run is not marked as finished: step {steps}, its last, is not saved")
            return
        done = Finished(step=steps, identity=identity(newest), loss_before=loss_before, loss_after=loss_after)
        try:
            done.write(self._run_dir)
        except OSError as error:
            raise UnwritableError(
                f"the run is trained and saved, but cannot be marked as finished ({reason_of(error)}); "
                f"{advice_on(error)}: the same command evaluates it again and marks it"
            ) from None

    def _open(self) -> Start:
        self._made = prepare_run_dir(self._run_dir)
        with self._advice():
            self._lock = RunLock(self._run_dir, tell=self._tell).__enter__()
        return decide_start(self._config, job=job_name())

    def _close(self) -> None:
        if self._lock is not None:
            self._lock.__exit__(None, None, None)
        for folder in self._made:
            with suppress(OSError):  # only what is empty goes
                folder.rmdir()

    def _prepare(self) -> None:
        for note in self.start.notes:
            self._tell(note)
        if self.start.folder == "new":
            self._make_room()
        with self._advice():
            self._change_line()

    @contextmanager
    def _advice(self) -> Iterator[None]:
        """What the system says of a file, as what to write instead."""
        try:
            yield
        except OSError as error:
            if error.errno is None:  # it is our own, and says so
                raise
            raise UnwritableError(
                f"train.run_dir '{self._run_dir}' cannot be written to ({reason_of(error)}); {advice_on(error)}, or "
                "write another train.run_dir"
            ) from None

    def _make_room(self) -> None:
        assert self._lock is not None
        if holds_run(self._run_dir):
            self._lock.refuse_jobs_below(self._run_dir)
        old = make_room(self._run_dir, "archive" if self.start.again else self._config.train.on_existing_run)
        if old is None:
            return
        self._tell(f"{self._run_dir} held another run, which is now {old}")  # at once: whatever follows may fail
        if old.is_symlink():
            self._tell(f"{old} is a link to {os.path.realpath(old)}; this run is written to {self._run_dir} itself")
        if (old / CHECKPOINTS).is_symlink():
            self._tell(f"its checkpoints are on another disk; this run's are written to {self._folder.root}")
        prepare_run_dir(self._run_dir)
        self._lock.take()
        self._lock.release(old / LOCK)

    def _change_line(self) -> None:
        """Makes the line of the checkpoints here that of `start`."""
        begins = self.start.folder == "new"  # whatever checkpoints lie here are none of its own
        change = LineChange(self._run_dir, None if begins else self.start.own or self._folder.latest())
        change.make({Begun.FILE: self.start.begun.text(), "config.yaml": dump_run_config(self._config)})
        others = change.others
        if change.aside is not None:
            self._tell(
                f"{len(others)} checkpoint(s), of step {others[0]} to {others[-1]}, are not of the line that the run "
                f"goes on with, and have been moved to {change.aside}; checkpoint.resume: {change.aside} goes back to "
                "them"
            )
        if change.brings_back and self.place is not None:
            replay(self._run_dir, self._tell)
            self._tell(
                f"the checkpoints up to {self.place.name} that had been set aside are back in {self._folder.root}, and "
                "metrics.jsonl and TensorBoard's curves are theirs again"
            )


def on_main(comm: Comm, work: Callable[[], T]) -> T:
    """What a call on rank 0 returns, or raises, on every rank. Every rank."""
    outcome: tuple[T | None, Exception | None] = (None, None)
    if comm.is_main:
        try:
            outcome = (work(), None)
        except Exception as error:
            outcome = (None, error)
    result, failure = comm.gather_objects(outcome)[0]
    if failure is not None:
        raise failure
    return result


def job_name() -> str:
    """What is the same in all attempts of one job: SLURM's number of it, or the process that starts them."""
    if (number := slurm_job()) is not None:
        return f"SLURM {number}"
    parent = psutil.Process(os.getppid())
    began = pids.began(parent.pid)
    return f"{pids.place()} {parent.pid} {began if began is not None else round(parent.create_time())}"
