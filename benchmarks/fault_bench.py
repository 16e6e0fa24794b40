"""What a fault is tried on: one run in a folder of its own, the moments of its life, and what must be true of it.

The oracle is a run of the same settings on the same strategy and ranks that nothing happened to (`Reference`): whatever
is done to a run, its `metrics.jsonl` must hold each step's loss once, to the last bit. Everything else that is checked
here is what docs/checkpoints.md promises: where a start goes on from, what it leaves, how it ends and what it says.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fault_layouts import Layout, Reference
from ranks import Job, Words

STEPS = 12
LIMIT = 240.0  # seconds for one start of a job, on a busy machine
POLL = 0.005  # seconds

SETTINGS = {
    "model.preset": "llama_nano",
    "data.seq_len": "32",
    "data.max_eval_sequences": "24",
    "loqt.rank": "8",
    "loqt.merge.gap": "4",
    "loqt.merge.schedule": "constant",
    "optim.lr": "5e-3",
    "train.steps": str(STEPS),
    "train.global_batch_size": "4",
    "train.micro_batch_size": "2",
    "train.device": "cpu",
    "train.progress": "off",
    "checkpoint.every": "2",
}


class Bad(Exception):
    """A run did not do what it should; the message says what happened, for people."""


class Bench:
    """One run, on which one fault is tried.

    Args:
        folder: Its own, empty.
        layout: How it is spread.
        text: What it trains on.
        rng: Every choice is made by it.
        reference: The unbroken run; None while that one is made.
    """

    def __init__(
        self, folder: Path, layout: Layout, text: Path, rng: random.Random, reference: Reference | None = None
    ) -> None:
        self.folder, self.layout, self.text, self.rng = folder, layout, text, rng
        self.run_dir, self.cache = folder / "run", folder / "cache"
        self._reference = reference
        self.story: list[str] = []  # what was done, for people
        self._jobs: list[Job] = []
        self._undo: list[Callable[[], object]] = []

    @property
    def reference(self) -> Reference:
        """The unbroken run."""
        assert self._reference is not None
        return self._reference

    @property
    def ranks(self) -> int:
        """Processes of a job."""
        return self.layout.ranks

    # ---- starting and ending jobs ------------------------------------------------------------------------------------

    def words(self, *more: str) -> list[str]:
        """The training command; later settings win."""
        own = {**SETTINGS, "data.cache_dir": str(self.cache), "train.run_dir": str(self.run_dir)}
        settings = [f"--{key}={value}" for key, value in own.items()]
        return ["train", f"--data.files={json.dumps([str(self.text)])}", *settings, *self.layout.words, *more]

    def start(self, *more: str, prepare: Callable[[int], None] | None = None, words: Words | None = None) -> Job:
        """Starts the training command, or `words`, on the layout's ranks."""
        self.say("start" + (f" {' '.join(more)}" if more else ""))
        chosen = self.words(*more) if words is None else words
        return self._started(chosen, self.ranks, self.layout.strategy != "single", prepare)

    def command(self, *words: str, prepare: Callable[[int], None] | None = None) -> tuple[int | None, str]:
        """Runs another command of the package in one process; its exit status and output."""
        self.say(f"run {words[0]}")
        job = self._started(list(words), 1, False, prepare)
        return self.end(job)[0], job.output()

    def _started(self, words: Words, ranks: int, launched: bool, prepare: Callable[[int], None] | None) -> Job:
        logs = self.folder / f"logs-{len(self._jobs)}"
        environment = {"HF_HUB_OFFLINE": "1"}
        job = Job(words, logs, ranks=ranks, launched=launched, environment=environment, prepare=prepare)
        self._jobs.append(job)
        return job

    def end(self, job: Job, seconds: float = LIMIT) -> list[int | None]:
        """Waits for a job; statuses by rank.

        Raises:
            Bad: It did not end in time, or somebody printed a traceback.
        """
        statuses = job.wait(seconds)
        self.say(f"ended with {statuses[0] if len(statuses) == 1 else statuses}")
        require(None not in statuses, f"still running after {seconds:.0f} s: {_tail(job.output())}")
        require("Traceback" not in job.output(), f"a traceback: {_tail(job.output())}")
        return statuses

    def say(self, what: str) -> None:
        """Notes what is done."""
        self.story.append(what)

    def later(self, undo: Callable[[], object]) -> None:
        """Has something done when the case is over, whatever its end."""
        self._undo.append(undo)

    def close(self) -> None:
        """Ends what is left running, and undoes what was done to the machine."""
        for job in self._jobs:
            job.kill()
        for undo in reversed(self._undo):
            undo()

    # ---- moments -----------------------------------------------------------------------------------------------------

    def await_moment(self, job: Job) -> str:
        """Waits for a moment in the job's life, any; its name."""
        rng = self.rng
        step = rng.randint(1, STEPS)
        name, wait = rng.choice(
            [
                ("a random time", lambda: self.sleep(job, rng.uniform(0, self.reference.seconds))),
                ("start-up", lambda: self.sleep(job, rng.uniform(0, 0.3 * self.reference.seconds))),
                (f"step {step} logged", lambda: self.until(job, lambda: self.logged() >= step)),
                ("a checkpoint half-written", lambda: self.await_save(job, rng.randint(1, STEPS))),
                ("the final evaluation", lambda: self.until(job, lambda: self.logged() >= STEPS)),
            ]
        )
        wait()
        if rng.random() < 0.5:
            self.sleep(job, rng.uniform(0, 0.1))
        self.say(f"at {name} ({self.logged()} steps logged)")
        return name

    def sleep(self, job: Job, seconds: float) -> None:
        """Waits, unless the job ends before."""
        until = time.monotonic() + seconds
        self.until(job, lambda: time.monotonic() >= until)

    def until(self, job: Job, condition: Callable[[], bool]) -> bool:
        """Waits for a condition; False if the job ended, or a long time passed, without it."""
        deadline = time.monotonic() + LIMIT
        while job.running and time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(POLL)
        return condition()

    def await_step(self, job: Job, step: int) -> bool:
        """Waits until so many steps are logged; False if the job ended before."""
        return self.until(job, lambda: self.logged() >= step)

    def await_save(self, job: Job, step: int) -> bool:
        """Waits until a checkpoint is half-written, that of this step or a later one; False if the job ended before."""
        return self.until(job, lambda: self.logged() >= step - 1 and self.is_saving())

    def logged(self) -> int:
        """The last step whose loss is in the run's metrics; 0 if there is none."""
        return max((row["step"] for row in self.rows() if "train/loss" in row), default=0)

    def is_saving(self) -> bool:
        """Whether a checkpoint is half-written now."""
        return any((self.run_dir / "checkpoints").glob(".step-*.partial"))

    # ---- what is there -----------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, float]]:
        """Whole rows of metrics.jsonl."""
        path, rows = self.run_dir / "metrics.jsonl", []
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError:
            return []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows

    def checkpoints(self) -> list[Path]:
        """Published checkpoints, by step."""
        root = self.run_dir / "checkpoints"
        found = [path for path in root.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name) and path.is_dir()]
        return sorted(found)

    def latest(self) -> Path | None:
        """What the run's own pointer names.

        Raises:
            Bad: It names something that is not there.
        """
        pointer = self.run_dir / "checkpoints" / "latest"
        if not pointer.is_file():
            return None
        folder = pointer.parent / pointer.read_text().strip()
        require(folder.is_dir(), f"checkpoints/latest names {folder.name}, which is not there")
        return folder

    def saved(self) -> int:
        """Step of the latest checkpoint; 0 if there is none."""
        latest = self.latest()
        return 0 if latest is None else step_of(latest)

    # ---- what must be true -------------------------------------------------------------------------------------------

    def kill(self, job: Job, rank: int | None = None) -> None:
        """SIGKILL, to one rank or all, and waits for all if all."""
        job.send(signal.SIGKILL, rank)
        self.say("kill -9" + ("" if rank is None else f" of rank {rank}"))
        if rank is None:
            self.end(job)

    def train_until(self, step: int, *more: str, prepare: Callable[[int], None] | None = None) -> Job:
        """A job that is killed when so many steps are logged, and something has been saved."""
        job = self.start(*more, prepare=prepare)
        self.until(job, lambda: self.logged() >= step and self.saved() > 0)
        self.kill(job)
        require(self.saved() > 0, f"nothing was saved after {self.logged()} steps: {_tail(job.output())}")
        return job

    def go_on(self, *more: str, prepare: Callable[[int], None] | None = None, at_least: int | None = None) -> Job:
        """The same command, to its end: it goes on from the newest checkpoint (or step `at_least`) and ends well.

        Raises:
            Bad: It began elsewhere, moved the run aside, or ended otherwise.
        """
        saved = self.saved() if at_least is None else at_least
        job = self.start(*more, prepare=prepare)
        statuses = self.end(job)
        require(not any(statuses), f"ended with {statuses}: {_tail(job.output())}")
        self.check_began_at(job, saved)
        return job

    def check_began_at(self, job: Job, saved: int) -> None:
        """Raises Bad unless a job has gone on from this step, or a later one, instead of training it again."""
        told = re.search(r"resumed after step (\d+)", job.output())
        if saved and told is None:
            require(saved >= STEPS, f"step {saved} was saved, but the run began anew: {_tail(job.output(0))}")
            trained = re.search(r"^step \d+|eval at step 0", job.output(0), re.MULTILINE)
            require(trained is None, f"a finished run was trained again: {_tail(job.output(0))}")
        require(told is None or int(told[1]) >= saved, f"step {saved} was saved, but it {told and told[0]}")
        self.check_not_moved()

    def check_not_moved(self) -> None:
        """Raises Bad if a run that had saved something was moved aside."""
        moved = sorted({path.parts[-3] for path in self.run_dir.parent.glob("run.old-*/checkpoints/step-*")})
        require(not moved, f"the run was moved aside to {moved}")

    def check_whole(self) -> None:
        """Raises Bad unless the run is over and says what the unbroken one says of each step and evaluation."""
        self.check_losses(self.reference.losses, self.reference.evaluations)
        require(not self.is_saving(), "a half-written checkpoint was left behind")
        require(self.saved() == STEPS, f"the latest checkpoint is of step {self.saved()}, not of the last")
        self.check_not_moved()

    def check_losses(self, losses: Mapping[int, float], evaluations: Mapping[int, float]) -> None:
        """Raises Bad unless metrics.jsonl holds exactly these, each step once."""
        for key, wanted in (("train/loss", losses), ("eval/loss", evaluations)):
            found = [(int(row["step"]), row[key]) for row in self.rows() if key in row]
            steps = [step for step, _ in found]
            twice = sorted({step for step in steps if steps.count(step) > 1})
            require(not twice, f"{key} of steps {twice} is there twice")
            missing = sorted(wanted.keys() - set(steps))
            require(not missing, f"{key} of steps {missing} is missing")
            other = [step for step, value in found if wanted.get(step) != value]
            require(not other, f"{key} of steps {other} differs from the unbroken run's")

    def check_again(self, *more: str) -> None:
        """The same command after the end: it says that the run is finished and changes nothing."""
        before = self.snapshot()
        job = self.start(*more)
        statuses = self.end(job)
        require(not any(statuses), f"a finished run started again ended with {statuses}: {_tail(job.output())}")
        require(self.snapshot() == before, f"a finished run started again was changed: {_tail(job.output(0))}")
        self.check_not_moved()

    def snapshot(self) -> dict[str, bytes]:
        """The run's metrics and the checksums of its checkpoints, by name."""
        files = [self.run_dir / "metrics.jsonl", *self.run_dir.glob("checkpoints/step-*/manifest.json")]
        return {str(path.relative_to(self.run_dir)): path.read_bytes() for path in files if path.is_file()}

    def check_refused(self, job: Job, *, seconds: float = LIMIT, about: Sequence[str] = ()) -> None:
        """Raises Bad unless every rank ends with status 2, about one of these words, and nothing has changed."""
        before = self.snapshot()
        statuses = self.end(job, seconds)
        output = job.output()
        require(all(status == 2 for status in statuses), f"status {statuses} instead of 2: {_tail(output)}")
        require("error:" in output, f"no line that says what is wrong: {_tail(output)}")
        if about:
            require(any(word in output for word in about), f"nothing about {' or '.join(about)}: {_tail(output)}")
        require(self.snapshot() == before, "a refused start has changed the run")
        self.check_not_moved()


def require(condition: bool, what: str) -> None:
    """Raises Bad with this text unless the condition holds."""
    if not condition:
        raise Bad(what)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def is_root() -> bool:
    """Whether file systems can be mounted."""
    return os.name == "posix" and os.geteuid() == 0


def mount(bench: Bench, *words: str, at: Path) -> bool:
    """Mounts something until the case is over; False if this machine does not allow it."""
    if not is_root() or subprocess.run(["mount", *words, str(at)], capture_output=True).returncode:
        return False
    bench.later(lambda: subprocess.run(["umount", "-l", str(at)], capture_output=True))
    return True


def _tail(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return " / ".join(lines[-4:])[-600:]


def unbroken(folder: Path, layout: Layout, text: Path) -> Reference:
    """Makes the reference of a layout; its text stays in the folder's cache."""
    bench = Bench(folder, layout, text, random.Random(0))
    for _ in range(2):  # the second time everything is in its cache, as in what it is compared with
        began = time.monotonic()
        bench.run_dir = folder / f"run-{began}"
        bench.end(job := bench.start())
        require(bench.logged() == STEPS, f"the run without faults did not end: {_tail(job.output())}")
        seconds = time.monotonic() - began
    rows = bench.rows()
    return Reference(
        losses={int(row["step"]): row["train/loss"] for row in rows if "train/loss" in row},
        evaluations={int(row["step"]): row["eval/loss"] for row in rows if "eval/loss" in row},
        seconds=seconds,
    )


def unbroken_lines(rows: Sequence[Mapping[str, float]], key: str) -> dict[int, float]:
    """A metric by step.

    Raises:
        Bad: A step is there twice.
    """
    steps = [int(row["step"]) for row in rows if key in row]
    require(len(steps) == len(set(steps)), f"{key} has a step twice: {steps}")
    return {int(row["step"]): row[key] for row in rows if key in row}


def saved_run(bench: Bench) -> Path:
    """A run that was killed after a few steps; its latest checkpoint."""
    bench.train_until(bench.rng.randint(3, STEPS - 3))
    latest = bench.latest()
    assert latest is not None
    return latest
