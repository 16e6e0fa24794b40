"""Faults of the campaign: processes that are killed, stand still, or are told to stop."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time

from common import ROOT
from fault_bench import LIMIT, STEPS, Bench, require
from fault_table import SEVERAL, fault
from ranks import Job

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
