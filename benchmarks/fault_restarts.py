"""Faults of the campaign: other jobs in the folder, runs that go back, grow, or are over."""

from __future__ import annotations

import signal

from fault_bench import LIMIT, STEPS, Bench, require, step_of, unbroken_lines
from fault_table import fault
from ranks import Job

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
