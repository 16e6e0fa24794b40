"""Faults of the campaign: data that breaks off, disks that are full, a console that nobody reads."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from pathlib import Path

from fault_bench import LIMIT, STEPS, Bench, mount, require
from fault_table import fault

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
