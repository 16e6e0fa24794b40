"""The faults of the campaign that befall a run from outside: death, signals, disks, other jobs, changed minds.

Each is a function of a `Bench`: it does something to a run, and raises `Bad` if what follows is not what should. The
table `FAULTS` holds them by kind and variant; those of files and settings are in `fault_files`.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import ROOT
from fault_bench import LIMIT, STEPS, Bench, mount, require, step_of, unbroken_lines
from ranks import Job

Fault = Callable[[Bench], None]
ANY, ALONE, SEVERAL = "any", "alone", "several"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way in which a kind of fault happens.

    Args:
        kind: What the table counts it under.
        name: What is done.
        run: Does it.
        where: On any layout, on one process only, on several only.
        known: It ended badly once, and is tried in every run of the fast tests.
    """

    kind: str
    name: str
    run: Fault
    where: str
    known: bool


FAULTS: list[Variant] = []


def fault(kind: str, name: str, where: str = ANY, *, known: bool = False) -> Callable[[Fault], Fault]:
    """Puts a function into the table; see `Variant`."""

    def put(run: Fault) -> Fault:
        FAULTS.append(Variant(kind=kind, name=name, run=run, where=where, known=known))
        return run

    return put


# ---- death -----------------------------------------------------------------------------------------------------------


@fault("kill -9", "of all, at any moment, up to three times")
def killed(bench: Bench) -> None:
    for _ in range(bench.rng.randint(1, 3)):
        job = bench.start()
        bench.await_moment(job)
        bench.kill(job)
    bench.go_on()
    bench.check_whole()


@fault("kill -9", "of all, inside a merge or a save")
def killed_inside(bench: Bench) -> None:
    from tests.distributed.killed import POINTS, arm

    point, call, mark = bench.rng.choice(sorted(POINTS)), bench.rng.randint(1, 12), bench.folder / "mark"
    bench.say(f"rank 0 dies at call {call} of: {point}")
    job = bench.start(prepare=lambda rank: arm(point, call, mark) if rank == 0 else None)
    bench.until(job, mark.exists)
    bench.kill(job)
    bench.go_on()
    bench.check_whole()


@fault("kill -9", "of one rank: the others end, and name it", SEVERAL)
def one_rank_killed(bench: Bench) -> None:
    victim = bench.rng.randrange(bench.ranks)
    job = bench.start("--parallel.timeout_seconds=30")
    bench.await_moment(job)
    trained, over = bench.logged() > 0, bench.logged() >= STEPS
    bench.kill(job, victim)
    began = time.monotonic()
    statuses = bench.end(job)
    if not over:
        check_survivors(bench, job, statuses, victim, trained)
        require(time.monotonic() - began < 90, "the survivors waited far beyond parallel.timeout_seconds")
    bench.go_on("--parallel.timeout_seconds=30")
    bench.check_whole()


def check_survivors(bench: Bench, job: Job, statuses: list[int | None], victim: int, trained: bool) -> None:
    """Raises Bad unless those that lost a rank end with an error whose last line names it (and its host)."""
    for rank in range(bench.ranks):
        if rank == victim or statuses[victim] == 0:
            continue
        last = ([line for line in job.output(rank).splitlines() if line.strip()] or [""])[-1]
        if statuses[rank] == 0 and bench.logged() >= STEPS:
            continue  # it had nothing more to say to the other
        require(statuses[rank] not in (0, None), f"rank {rank} ended with {statuses[rank]} without rank {victim}")
        require(f"rank {victim}" in last, f"rank {rank}'s last line does not name rank {victim}: {last[:300]}")
        host = socket.gethostname()
        require(not trained or host in last, f"rank {rank}'s last line does not name the host {host}: {last[:300]}")


@fault("stop", "one rank stands still: the others end after the time-out, and name it", SEVERAL)
def one_rank_hangs(bench: Bench) -> None:
    victim, limit = bench.rng.randrange(bench.ranks), 10
    job = bench.start(f"--parallel.timeout_seconds={limit}")
    bench.await_moment(job)
    trained, over = bench.logged() > 0, bench.logged() >= STEPS
    job.send(signal.SIGSTOP, victim)
    bench.say(f"stop rank {victim}")
    others = [process for rank, process in enumerate(job.processes) if rank != victim]
    for process in others:
        process.join(6 * limit + 30)
    late = [process.name for process in others if process.exitcode is None]
    job.send(signal.SIGKILL, victim)
    statuses = bench.end(job)
    require(over or not late, f"{late} still waited {6 * limit + 30} s after a rank stopped (limit {limit} s)")
    if not over:
        check_survivors(bench, job, statuses, victim, trained)
    bench.go_on(f"--parallel.timeout_seconds={limit}")
    bench.check_whole()


@fault("stop", "all stand still for a while, and go on")
def all_pause(bench: Bench) -> None:
    job = bench.start()
    bench.await_moment(job)
    job.send(signal.SIGSTOP)
    time.sleep(bench.rng.uniform(0.2, 2.0))
    job.send(signal.SIGCONT)
    require(not any(statuses := bench.end(job)), f"ended with {statuses}")
    bench.check_whole()


# ---- being told to stop ----------------------------------------------------------------------------------------------

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def tell(bench: Bench, job: Job, *numbers: signal.Signals) -> None:
    """Sends signals, a moment apart, to all ranks as a launcher does, or to one."""
    rank = bench.rng.choice([None, None, bench.rng.randrange(bench.ranks)])
    for index, number in enumerate(numbers):
        if index:
            time.sleep(bench.rng.uniform(0.0, 0.1))
        job.send(number, rank)
    bench.say(f"{', '.join(number.name for number in numbers)} to {'all' if rank is None else f'rank {rank}'}")


def check_stopped(bench: Bench, job: Job, statuses: list[int | None], numbers: tuple[signal.Signals, ...]) -> None:
    """Raises Bad unless all ranks ended as a stop ends, with what was there to save saved."""
    allowed = {0, *(128 + number for number in numbers)}
    require(set(statuses) <= allowed, f"status {statuses} instead of {sorted(allowed)}: {job.output()[-400:]}")
    require(len(set(statuses)) == 1, f"the ranks disagree on the end: {statuses}")
    if any(statuses) and bench.logged():
        logged, saved = bench.logged(), bench.saved()
        require(saved >= logged, f"{logged} steps were logged, but only {saved} are saved: {job.output()[-400:]}")


@fault("told to stop", "once, at any moment")
def told_once(bench: Bench) -> None:
    number, job = bench.rng.choice(SIGNALS), bench.start()
    bench.await_moment(job)
    tell(bench, job, number)
    check_stopped(bench, job, bench.end(job), (number,))
    bench.go_on()
    bench.check_whole()


@fault("told to stop", "twice, a moment apart")
def told_twice(bench: Bench) -> None:
    numbers = (bench.rng.choice(SIGNALS), bench.rng.choice(SIGNALS))
    job = bench.start()
    bench.await_moment(job)
    tell(bench, job, *numbers)
    check_stopped(bench, job, bench.end(job), numbers)
    bench.go_on()
    bench.check_whole()


@fault("told to stop", "SIGTERM and Ctrl-C while it trains", known=True)
def terminated_and_interrupted(bench: Bench) -> None:
    job = bench.start("--checkpoint.every=0")
    bench.await_step(job, 2)
    tell(bench, job, signal.SIGTERM, signal.SIGINT)
    check_stopped(bench, job, bench.end(job), SIGNALS)
    require(bench.saved() > 0, "it was stopped, but nothing is saved")
    bench.go_on("--checkpoint.every=0")
    bench.check_whole()


@fault("told to stop", "in the final evaluation")
def told_in_the_end(bench: Bench) -> None:
    number, job = bench.rng.choice(SIGNALS), bench.start()
    bench.await_step(job, STEPS)
    bench.sleep(job, bench.rng.uniform(0, 0.15))
    tell(bench, job, number)
    check_stopped(bench, job, bench.end(job), (number,))
    bench.go_on()
    bench.check_whole()


@fault("told to stop", "three times: it may leave at once, but nothing breaks")
def told_thrice(bench: Bench) -> None:
    numbers = tuple(bench.rng.choice(SIGNALS) for _ in range(3))
    job = bench.start()
    bench.await_moment(job)
    tell(bench, job, *numbers)
    bench.end(job)
    bench.go_on()
    bench.check_whole()


@fault("told to stop", "while Python still imports")
def told_while_importing(bench: Bench) -> None:
    number = bench.rng.choice(SIGNALS)
    words = [sys.executable, str(ROOT / "launch" / "train.py"), *bench.words("--parallel.strategy=auto")[1:]]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    bench.later(process.kill)
    time.sleep(bench.rng.uniform(0.5, 6.0))
    process.send_signal(number)
    output, _ = process.communicate(timeout=LIMIT)
    bench.say(f"{number.name} to a real process, which ended with {process.returncode}")
    require(process.returncode in (0, -number, 128 + number), f"status {process.returncode}: {output[-300:]}")
    require("Traceback" not in output, f"a traceback: {output[-400:]}")


# ---- data that breaks off --------------------------------------------------------------------------------------------


@fault("data breaks off", "reading the next batch raises, on all ranks or on one")
def broken_data(bench: Bench) -> None:
    step, odd = bench.rng.randint(1, STEPS - 1), bench.rng.choice([None, bench.rng.randrange(bench.ranks)])
    error = bench.rng.choice([OSError(5, "Input/output error"), RuntimeError("the stream broke off"), EOFError()])
    bench.say(f"step {step + 1} cannot be read ({error!r}) on {'all' if odd is None else f'rank {odd}'}")
    prepare = lambda rank: break_data(step, error) if odd in (None, rank) else None  # noqa: E731
    job = bench.start("--checkpoint.every=0", "--parallel.timeout_seconds=20", prepare=prepare)
    statuses = job.wait(LIMIT)  # an error that nobody can foresee may show its traceback
    bench.say(f"ended with {statuses}")
    require(None not in statuses and 0 not in statuses, f"ended with {statuses}: {job.output()[-400:]}")
    if odd is None or bench.ranks == 1:
        require(bench.saved() >= step, f"{step} steps were done, {bench.saved()} are saved: {job.output()[-400:]}")
    bench.go_on("--checkpoint.every=0", "--parallel.timeout_seconds=20")
    bench.check_whole()


def break_data(step: int, error: Exception) -> None:
    """In this process, reading a step's sequences raises."""
    from loqt_scale.data.batches import StoredSequences

    read = StoredSequences.sequences

    def sequences(self: StoredSequences, wanted: int, *arguments: int) -> object:
        if wanted == step:
            raise error
        return read(self, wanted, *arguments)

    StoredSequences.sequences = sequences  # type: ignore[method-assign, assignment]


# ---- no room ---------------------------------------------------------------------------------------------------------


def small_disk(bench: Bench, megabytes: int = 24) -> bool:
    """Puts the run folder on a file system of its own; False where that is not allowed."""
    bench.run_dir.mkdir(parents=True, exist_ok=True)
    return mount(bench, "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", at=bench.run_dir)


def fill(bench: Bench) -> Path:
    """Takes what room there is, but for up to 200 kB; the file that holds it."""
    filler, left = bench.run_dir / "filler", bench.rng.choice([0, bench.rng.randint(0, 200_000)])
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    os.truncate(filler, max(0, filler.stat().st_size - left))
    bench.say(f"the disk is full but for {left} bytes, at step {bench.logged()}")
    return filler


@fault("full disk", "from some moment on, and room again before the next start", known=True)
def full_to_the_end(bench: Bench) -> None:
    if not small_disk(bench):
        return limited_files(bench)
    job = bench.start()
    bench.await_step(job, bench.rng.randint(1, STEPS - 1))
    filler = fill(bench)
    statuses = bench.end(job)
    # 2: the run came to its end, but its last checkpoint is not saved
    require(set(statuses) in ({0}, {2}), f"a full disk ended the run with {statuses}: {job.output()[-400:]}")
    require("WARNING" in job.output(0), "nothing was said about the full disk")
    left = [path.name for path in (bench.run_dir / "checkpoints").glob(".step-*")]
    require(not left, f"{left} keeps the disk full")
    filler.unlink()
    bench.go_on()
    bench.check_whole()


@fault("full disk", "for a while: what could not be written is written afterwards")
def full_for_a_while(bench: Bench) -> None:
    if not small_disk(bench):
        return limited_files(bench)
    job = bench.start()
    bench.await_step(job, bench.rng.randint(1, STEPS // 2))
    filler = fill(bench)
    bench.sleep(job, bench.rng.uniform(0.0, 0.4) * bench.reference.seconds)
    in_time = job.running
    filler.unlink()
    bench.say("room again" + ("" if in_time else ", too late"))
    statuses = bench.end(job)
    require(set(statuses) in ({0}, {2}), f"a full disk ended the run with {statuses}: {job.output()[-400:]}")
    if set(statuses) == {0} and in_time:
        bench.check_losses(bench.reference.losses, {0: bench.reference.evaluations[0]} | present(bench))
    bench.go_on()
    bench.check_whole()


def present(bench: Bench) -> dict[int, float]:
    """The reference's evaluations, those that the run has written."""
    steps = {int(row["step"]) for row in bench.rows() if "eval/loss" in row}
    return {step: value for step, value in bench.reference.evaluations.items() if step in steps}


@fault("full disk", "files may not grow: nothing can be saved")
def limited_files(bench: Bench) -> None:
    size = bench.rng.randint(3_000, 120_000)
    bench.say(f"files may have {size} bytes")
    job = bench.start(prepare=lambda rank: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    statuses = bench.end(job)
    began = bench.logged() > 0 or "eval at step 0" in job.output(0)
    # 2: not even the text's cache could be written; or the run came to its end, but could not save it
    require(set(statuses) in ({0}, {2}), f"ended with {statuses}: {job.output()[-400:]}")
    require(not began or "WARNING" in job.output(0), "nothing was said about what could not be written")
    bench.go_on()
    bench.check_whole()


@fault("full disk", "full before the start")
def full_at_the_start(bench: Bench) -> None:
    if not small_disk(bench):
        return limited_files(bench)
    filler = fill(bench)
    job = bench.start()
    statuses = bench.end(job)
    require(set(statuses) <= {0, 2}, f"ended with {statuses}: {job.output()[-400:]}")
    filler.unlink()
    bench.go_on()
    bench.check_whole()


@fault("full disk", "the console is a pipe that nobody reads any more", known=True)
def closed_console(bench: Bench) -> None:
    after = bench.rng.uniform(0, bench.reference.seconds)

    def pipe(rank: int) -> None:
        reading, writing = os.pipe()
        for stream in (1, 2) if bench.rng.random() < 0.3 else (1,):
            os.dup2(writing, stream)
        os.close(writing)
        if os.fork() == 0:  # the reader: a line or so, then gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            time.sleep(after)
            os._exit(0)
        os.close(reading)

    job = bench.start(prepare=pipe)
    statuses = bench.end(job)
    require(not any(statuses), f"ended with {statuses}: {job.output()[-400:]}")
    bench.check_whole()


# ---- another job in the same folder ----------------------------------------------------------------------------------


def second_one(bench: Bench) -> list[str]:
    """Settings of a second job in the same run folder: another seed, another spelling of the folder, or none."""
    link = bench.folder / "other-name"
    link.symlink_to(bench.run_dir, target_is_directory=True)
    return bench.rng.choice([["--train.seed=7"], [], [f"--train.run_dir={link}"], ["--checkpoint.resume=never"]])


@fault("second job", "in the folder of one that trains", known=True)
def second_job(bench: Bench) -> None:
    first, more = bench.start(), second_one(bench)
    bench.await_step(first, bench.rng.randint(1, STEPS // 2))
    if bench.rng.random() < 0.7:
        first.send(signal.SIGSTOP)  # whatever happens, it has not ended
    second = bench.start(*more)
    second.wait(LIMIT)
    alive = first.running
    first.send(signal.SIGCONT)
    statuses = bench.end(first)
    require(not any(statuses), f"the first job ended with {statuses}: {first.output()[-400:]}")
    bench.check_whole()
    if alive:
        statuses = bench.end(second)
        require(set(statuses) == {2}, f"the second job ended with {statuses}: {second.output()[-400:]}")
        require(str(first.processes[0].pid) in second.output(), f"which job runs? {second.output()[-400:]}")


@fault("second job", "both start at once")
def two_at_once(bench: Bench) -> None:
    jobs = [bench.start(), bench.start()]
    ends = [bench.end(job) for job in jobs]
    good = [statuses for statuses in ends if not any(statuses)]
    refused = [statuses for statuses in ends if set(statuses) == {2}]
    require(len(good) + len(refused) == 2 and good != [], f"two jobs at once ended with {ends}")
    bench.check_whole()


@fault("second job", "after the first was killed: its lock is not in the way")
def lock_of_the_dead(bench: Bench) -> None:
    bench.train_until(bench.rng.randint(3, STEPS - 2))
    bench.go_on()
    bench.check_whole()


# ---- changed minds ---------------------------------------------------------------------------------------------------


@fault("going back", "to an earlier checkpoint, then killed, then the same command", known=True)
def going_back(bench: Bench) -> None:
    keep = "--checkpoint.keep_last=9"
    if bench.rng.random() < 0.5:
        bench.end(bench.start(keep))
    else:
        bench.train_until(6, keep)
    earlier = bench.rng.choice(bench.checkpoints()[:-1])
    back = [f"--checkpoint.resume={earlier}", f"--checkpoint.keep_last={bench.rng.randint(1, 3)}"]
    bench.say(f"go back to step {step_of(earlier)} of {[step_of(path) for path in bench.checkpoints()]}")
    pointer = bench.run_dir / "checkpoints" / "latest"
    before = (pointer.read_text(), pointer.stat().st_mtime_ns)
    job = bench.start(*back, f"--checkpoint.background={bench.rng.choice(['true', 'false'])}")
    new = bench.rng.randint(step_of(earlier) + 1, STEPS)
    bench.until(job, lambda: new <= bench.logged() <= new + 1 and f"after step {step_of(earlier)}" in job.output(0))
    bench.kill(job)
    require("resumed after" in job.output(0), f"it did not go back: {job.output()[-400:]}")
    again = back if bench.rng.random() < 0.5 else back[1:]
    saved = bench.saved()
    if (pointer.read_text(), pointer.stat().st_mtime_ns) == before:  # nothing new: it may begin where it did
        saved = step_of(earlier)
    bench.go_on(*again, at_least=saved)
    bench.check_whole()
    bench.check_again(*again[-1:])


@fault("going back", "of a finished run, to its end: what was published last stays")
def back_to_the_end(bench: Bench) -> None:
    bench.end(bench.start("--checkpoint.keep_last=9"))
    earlier = bench.rng.choice(bench.checkpoints()[:-1])
    keep = bench.rng.randint(1, 4)
    bench.say(f"go back to step {step_of(earlier)}, keep {keep}")
    job = bench.start(f"--checkpoint.resume={earlier}", f"--checkpoint.keep_last={keep}")
    require(not any(statuses := bench.end(job)), f"ended with {statuses}: {job.output()[-400:]}")
    require(f"resumed after step {step_of(earlier)}" in job.output(0), f"it did not go back: {job.output()[-400:]}")
    bench.check_whole()
    steps = [step_of(path) for path in bench.checkpoints()]
    wanted = [step for step in range(step_of(earlier), STEPS + 1, 2)][-keep:]
    require(set(wanted) <= set(steps), f"the last {keep} of {wanted} were to be kept, there are {steps}")


@fault("extending", "train.steps of a finished run grows")
def extended(bench: Bench) -> None:
    bench.end(bench.start())
    more = f"--train.steps={STEPS + bench.rng.randint(1, 6)}"
    if bench.rng.random() < 0.5:
        job = bench.start(more)
        bench.until(job, lambda: bench.logged() > STEPS)
        bench.kill(job)
        require(bench.saved() >= STEPS, "the extension lost the run's last checkpoint")
    check_extended(bench, bench.go_on(more), int(more.partition("=")[2]), STEPS)


@fault("extending", "train.steps of a killed run grows")
def extended_early(bench: Bench) -> None:
    bench.train_until(bench.rng.randint(3, STEPS - 3))
    more, saved = f"--train.steps={STEPS + bench.rng.randint(1, 6)}", bench.saved()
    check_extended(bench, bench.go_on(more), int(more.partition("=")[2]), saved)


def check_extended(bench: Bench, job: Job, steps: int, before: int) -> None:
    """Raises Bad unless the steps before are the unbroken run's, and those after are there, once."""
    lines = unbroken_lines(bench.rows(), "train/loss")
    require(sorted(lines) == list(range(1, steps + 1)), f"steps {sorted(lines)} instead of 1 to {steps}")
    other = [step for step in range(1, before + 1) if lines[step] != bench.reference.losses[step]]
    require(not other, f"losses of steps {other}, from before it was extended, have changed")
    require(bench.saved() == steps, f"the latest checkpoint is of step {bench.saved()}: {job.output()[-300:]}")
    require(steps in unbroken_lines(bench.rows(), "eval/loss"), "its end was not evaluated")
    bench.check_not_moved()


@fault("finished", "the same command again says so and changes nothing")
def again(bench: Bench) -> None:
    require(not any(statuses := bench.end(bench.start())), f"ended with {statuses}")
    bench.check_whole()
    bench.check_again()


@fault("finished", "killed in the final evaluation: loaded, evaluated, over", known=True)
def killed_in_the_end(bench: Bench) -> None:
    job = bench.start()
    bench.until(job, lambda: bench.logged() >= STEPS and bench.saved() >= STEPS)
    bench.sleep(job, bench.rng.uniform(0, 0.1))
    bench.kill(job)
    bench.go_on()
    bench.check_whole()
    bench.check_again()


# ---- folders that are elsewhere --------------------------------------------------------------------------------------


def moved_and_linked(path: Path, elsewhere: Path) -> None:
    """Moves a folder and leaves a symbolic link to it."""
    path.rename(elsewhere)
    path.symlink_to(elsewhere, target_is_directory=True)


@fault("link", "checkpoints/ moved to another disk and linked", known=True)
def linked_checkpoints(bench: Bench) -> None:
    if bench.rng.random() < 0.5:
        bench.run_dir.mkdir()
        (bench.folder / "other disk").mkdir()
        (bench.run_dir / "checkpoints").symlink_to(bench.folder / "other disk", target_is_directory=True)
        bench.train_until(4)
    else:
        bench.train_until(4)
        moved_and_linked(bench.run_dir / "checkpoints", bench.folder / "other disk")
    if bench.rng.random() < 0.5:
        bench.train_until(8)
    bench.go_on()
    require((bench.run_dir / "checkpoints").is_symlink(), "the link is gone")
    bench.check_whole()
    bench.check_again()


@fault("link", "the run folder is a link, or spelled otherwise")
def other_spelling(bench: Bench) -> None:
    here, name = bench.run_dir.parent, bench.run_dir.name
    link = bench.folder / "linked"
    link.symlink_to(bench.run_dir, target_is_directory=True)
    plain = [str(link), f"{bench.run_dir}/", f"{here}/./{name}", f"{bench.run_dir}/../{name}", name]
    check_spelling(bench, bench.rng.choice([*plain, f"$HERE/{name}", f"${{HERE}}/{name}"]))


@fault("link", "the run folder is written with ~", known=True)
def tilde(bench: Bench) -> None:
    check_spelling(bench, f"~/{bench.run_dir.name}")


def check_spelling(bench: Bench, spelled: str) -> None:
    """A run goes on in its folder however that is called, and no folder is made that is called like a variable."""
    here = bench.run_dir.parent

    def prepare(rank: int) -> None:
        os.chdir(here)
        os.environ["HOME"] = os.environ["HERE"] = str(here)

    bench.train_until(4)
    bench.say(f"the folder is now {spelled.replace(str(here), '...')}")
    bench.go_on(f"--train.run_dir={spelled}", prepare=prepare)
    bench.check_whole()
    strange = [path.name for path in here.iterdir() if path.name[0] in "~$"]
    require(not strange, f"folders named {strange} were made")


@fault("link", "a step's folder is a link")
def linked_step(bench: Bench) -> None:
    bench.train_until(bench.rng.randint(3, 8))
    latest = bench.latest()
    assert latest is not None
    moved_and_linked(latest, bench.folder / latest.name)
    bench.go_on(f"--checkpoint.keep_last={bench.rng.randint(1, 3)}")
    bench.check_whole()


@fault("link", "checkpoints/ is another file system")
def mounted_checkpoints(bench: Bench) -> None:
    (bench.run_dir / "checkpoints").mkdir(parents=True)
    if not mount(bench, "-t", "tmpfs", "-o", "size=64m", "tmpfs", at=bench.run_dir / "checkpoints"):
        return linked_checkpoints(bench)
    bench.train_until(4)
    bench.go_on()
    bench.check_whole()
    bench.check_again()


# ---- ranks that do not fit together ----------------------------------------------------------------------------------


@fault("foreign rank", "reads another text", SEVERAL, known=True)
def other_text(bench: Bench) -> None:
    odd, text = bench.rng.randrange(bench.ranks), bench.text.read_text()
    where, position = nodes(bench), bench.rng.randrange(len(text) // 2, len(text) - 1)
    for rank, folder in enumerate(where):
        (folder / "text.txt").write_text(text[:position] + "~" + text[position + 1 :] if rank == odd else text)
    bench.say(f"rank {odd} reads a text with another character at {position}")
    own_cache = ["--data.cache_dir=cache"] if bench.rng.random() < 0.5 else []
    settings = ['--data.files=["text.txt"]', "--parallel.timeout_seconds=30", *own_cache]
    all_good = lambda rank: os.chdir(where[1 - odd])  # noqa: E731
    if bench.rng.random() < 0.5:
        bench.train_until(3, *settings, prepare=all_good)
    job = bench.start(*settings, prepare=lambda rank: os.chdir(where[rank]))
    bench.check_refused(job, seconds=100)
    bench.go_on(*settings, prepare=all_good)
    bench.check_whole()


def nodes(bench: Bench) -> list[Path]:
    """A working directory for each rank, as if it were another machine's."""
    folders = [bench.folder / f"node-{rank}" for rank in range(bench.ranks)]
    for folder in folders:
        folder.mkdir()
    return folders


@fault("foreign rank", "has other settings", SEVERAL)
def other_settings(bench: Bench) -> None:
    odd = bench.rng.randrange(bench.ranks)
    key, value = bench.rng.choice(
        [
            ("train.seed", "3"),
            ("optim.lr", "6e-3"),
            ("loqt.merge.gap", "5"),
            ("loqt.rank", "16"),
            ("data.seq_len", "16"),
        ]
    )
    bench.say(f"rank {odd} has {key} {value}")
    words = lambda rank: bench.words("--parallel.timeout_seconds=30", *([f"--{key}={value}"] if rank == odd else []))  # noqa: E731
    if bench.rng.random() < 0.5:
        bench.train_until(3)
    bench.check_refused(bench.start(words=words), seconds=100, about=[key.rpartition(".")[2]])
    bench.go_on()
    bench.check_whole()


@fault("foreign rank", "has no such file", SEVERAL)
def missing_file(bench: Bench) -> None:
    odd = bench.rng.randrange(bench.ranks)
    where = nodes(bench)
    for rank, folder in enumerate(where):
        if rank != odd:
            shutil.copy(bench.text, folder / "text.txt")
    bench.say(f"rank {odd} has no text")
    settings = ['--data.files=["text.txt"]', "--parallel.timeout_seconds=120"]
    job = bench.start(*settings, prepare=lambda rank: os.chdir(where[rank]))
    began = time.monotonic()
    bench.check_refused(job, about=["text.txt"])
    require(time.monotonic() - began < 60, "the other ranks waited for one that had failed at the start")
    bench.go_on()
    bench.check_whole()


@fault("foreign rank", "rank 0 cannot make the run folder")
def blocked_folder(bench: Bench) -> None:
    (bench.folder / "file").write_text("in the way")
    job = bench.start(f"--train.run_dir={bench.folder / 'file' / 'run'}", "--parallel.timeout_seconds=120")
    began = time.monotonic()
    bench.check_refused(job, about=["run_dir"])
    require(time.monotonic() - began < 60, "the other ranks waited for one that had failed at the start")
    bench.go_on()
    bench.check_whole()
