"""Processes that do runs beside one another, for as long as there is time."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from quality_runs import Place, Run

from loqt_scale.errors import UserError

Ask = Callable[[], list[Run]]
_SPAWN = multiprocessing.get_context("spawn")


def serve(pipe: Connection, place: Place) -> None:
    """What a worker does: runs, until its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair
    from quality_training import free, train  # imports torch, which is the workers' affair

    try:
        while True:
            run = pipe.recv()
            answer: tuple[str, Any]
            try:
                answer = ("done", train(run, place, lambda done, seconds: pipe.send(("reached", (done, seconds)))))
            except (EOFError, BrokenPipeError):
                raise
            except UserError as error:
                answer = ("failed", str(error))
            except Exception:
                answer = ("failed", traceback.format_exc())
            pipe.send(answer)
            free()
    except (EOFError, BrokenPipeError):
        pass


class Worker:
    """One process; `run` is what it is at, or None.

    Args:
        place: Where its runs are done.
    """

    def __init__(self, place: Place) -> None:
        self.run: Run | None = None
        self.reached = 0  # steps of it
        self.pipe, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=serve, args=(theirs, place), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, run: Run) -> None:
        """Hands it a run."""
        self.run, self.reached = run, 0
        with suppress(OSError):  # it is dead, as its end of the pipe will say
            self.pipe.send(run)

    def end(self) -> None:
        """Kills it."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Workers:
    """A number of workers, and what is known of how long runs take.

    Args:
        jobs: How many.
        place: Where.
        deadline: On `time.monotonic`'s clock; no run goes on after it.
        keep: Takes the line of a finished run.
    """

    def __init__(self, jobs: int, place: Place, deadline: float, keep: Callable[[dict[str, Any]], object]) -> None:
        self.jobs, self.place, self.deadline, self.keep = jobs, place, deadline, keep
        self.workers = [Worker(place) for _ in range(jobs)]
        self.pace: dict[tuple[object, ...], float] = {}  # seconds a step, the slowest by method and shape
        self.done: set[Run] = set()
        self.failed: set[Run] = set()
        self.too_long: set[Run] = set()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.end()

    def do(self, ask: Ask) -> None:
        """Does whatever `ask` names, and asks again whenever a worker is idle, until there is nothing new or no time.

        Args:
            ask: What is not done yet, the most telling first.
        """
        while time.monotonic() < self.deadline:
            self._hand_out(ask)
            busy = {worker.pipe: worker for worker in self.workers if worker.run is not None}
            if not busy:
                break
            for pipe in wait(list(busy), timeout=min(max(0.0, self.deadline - time.monotonic()), 3600.0)):
                self._hear(busy[pipe])  # type: ignore[index]
        self._say_what_is_left()

    def _say_what_is_left(self) -> None:
        for worker in self.workers:
            if worker.run is not None:
                say(f"out of time after {worker.reached} of {worker.run.scale.steps} steps: {worker.run.words}")
        if self.too_long:
            say(f"not begun, for there was no time to end them: {len(self.too_long)} runs")

    def _hand_out(self, ask: Ask) -> None:
        taken = self.done | self.failed | self.too_long | {worker.run for worker in self.workers if worker.run}
        for run in ask():
            if run in taken:
                continue
            worker = self._idle()
            if worker is None:
                return
            taken.add(run)
            if time.monotonic() + self.seconds_of(run) > self.deadline:
                self.too_long.add(run)
            else:
                worker.begin(run)

    def _idle(self) -> Worker | None:
        """A worker without a run, or one in the place of a dead one; None if all are busy."""
        for worker in self.workers:
            if worker.run is None:
                return worker
        if len(self.workers) < self.jobs:
            self.workers.append(Worker(self.place))
            return self.workers[-1]
        return None

    def seconds_of(self, run: Run) -> float:
        """What a run should take, by those that have come to a quarter of theirs; 0 if nothing is known.

        A method that has not been seen is taken to be as fast as the fastest: trying costs an idle worker nothing.
        """
        others = [pace for kind, pace in self.pace.items() if kind[1:] == _kind(run)[1:]]
        return self.pace.get(_kind(run), min(others, default=0.0)) * run.scale.steps

    def _hear(self, worker: Worker) -> None:
        run = worker.run
        assert run is not None
        try:
            what, value = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            what, value = "failed", f"its process ended with {worker.process.exitcode}"
            self.workers.remove(worker)
        if what == "reached":
            worker.reached, seconds = value
            self.pace[_kind(run)] = max(self.pace.get(_kind(run), 0.0), seconds / worker.reached)
            return
        worker.run = None
        if what == "failed":
            self.failed.add(run)
            print(f"FAILED: {run.words}\n{value}", file=sys.stderr, flush=True)
        else:
            self.done.add(run)
            self.keep(value)


def _kind(run: Run) -> tuple[object, ...]:
    return run.method, run.scale


def say(line: str) -> None:
    """Prints a line for people."""
    print(line, file=sys.stderr, flush=True)
