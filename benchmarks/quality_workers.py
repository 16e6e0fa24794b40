"""Processes that do runs beside one another, for as long as there is time."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from quality_runs import Place, Run

Ask = Callable[[], list[Run]]
_SPAWN = multiprocessing.get_context("spawn")


def serve(pipe: Connection, place: Place) -> None:
    """What a worker does: runs, until its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair
    from quality_training import free, train  # imports torch, which is the workers' affair

    try:
        while True:
            run = pipe.recv()
            try:
                answer = ("done", train(run, place, lambda done, seconds: pipe.send(("reached", (done, seconds)))))
            except (EOFError, BrokenPipeError):
                raise
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
        self.pipe, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=serve, args=(theirs, place), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, run: Run) -> None:
        """Hands it a run."""
        self.run = run
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
        self.place, self.deadline, self.keep = place, deadline, keep
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
            busy = [worker for worker in self.workers if worker.run is not None]
            if not busy:
                return
            pipes = {worker.pipe: worker for worker in busy}
            for pipe in wait(list(pipes), timeout=min(max(0.0, self.deadline - time.monotonic()), 3600.0)):
                self._hear(pipes[pipe])  # type: ignore[index]
        for worker in self.workers:
            if worker.run is not None:
                say(f"out of time: {worker.run.words}")

    def _hand_out(self, ask: Ask) -> None:
        idle = [worker for worker in self.workers if worker.run is None]
        if not idle:
            return
        taken = (
            self.done | self.failed | self.too_long | {worker.run for worker in self.workers if worker.run is not None}
        )
        for run in ask():
            if not idle:
                return
            if run in taken:
                continue
            taken.add(run)
            if time.monotonic() + self.seconds_of(run) > self.deadline:
                self.too_long.add(run)
                say(f"not begun, it would take {self.seconds_of(run):.0f} s: {run.words}")
            else:
                idle.pop(0).begin(run)

    def seconds_of(self, run: Run) -> float:
        """What a run should take, by those that have come to a quarter of theirs; 0 if nothing is known."""
        same = self.pace.get(_kind(run), 0.0)
        others = [pace for kind, pace in self.pace.items() if kind[1:] == _kind(run)[1:]]
        return (same or max(others, default=0.0)) * run.scale.steps

    def _hear(self, worker: Worker) -> None:
        run = worker.run
        assert run is not None
        try:
            what, value = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            what, value = "failed", f"its process ended with {worker.process.exitcode}"
            self.workers[self.workers.index(worker)] = Worker(self.place)
        if what == "reached":
            done, seconds = value
            self.pace[_kind(run)] = max(self.pace.get(_kind(run), 0.0), seconds / done)
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
