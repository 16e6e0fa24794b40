"""One job per folder: real second processes, real kills, and other hosts by what can be seen of them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from loqt_scale.process import pids
from loqt_scale.training import runlock
from loqt_scale.training.runlock import LOCK, Holder, RunInUse, RunLock

HOLD = """
import sys, time
from pathlib import Path
from loqt_scale.process import pids
from loqt_scale.training.runlock import RunLock
with RunLock(Path(sys.argv[1]), beat=0.05):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_job(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the folder until its standard input ends."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    root = Path(__file__).resolve().parents[3]
    job = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=root, **pipes)
    try:
        assert job.stdout is not None and job.stdout.readline() == "held\n", job.communicate()
        yield job
    finally:
        job.kill()
        job.communicate()


def holder(folder: Path) -> Holder:
    return Holder(**json.loads((folder / LOCK).read_text()))


def leave(folder: Path, **changed: object) -> Holder:
    """A lock that somebody else has left."""
    left = replace(Holder.here(), **changed)
    (folder / LOCK).write_text(json.dumps(asdict(left)))
    return left


def test_it_names_its_holder_and_is_gone_afterwards(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        found = holder(tmp_path)
        assert found.pid == os.getpid() and found.lives() and abs(psutil.Process().create_time() - found.started) < 1
        with pytest.raises(RunInUse):
            RunLock(tmp_path).take()
    assert list(tmp_path.iterdir()) == []


def test_another_job_is_refused_until_it_is_killed(tmp_path: Path) -> None:
    """By whatever path it comes; after `kill -9` the next one gets in at once, dead processes not collected too."""
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with another_job(tmp_path / "run") as job:
        named = (
            rf"link' is in use by another job \(process {job.pid} on .*, since 20.*\); wait for its end, stop it, or"
        )
        for _ in range(2):
            with pytest.raises(RunInUse, match=named):
                RunLock(tmp_path / "link").take()
        job.send_signal(signal.SIGSTOP)
        with pytest.raises(RunInUse):  # asleep is not dead
            RunLock(tmp_path / "run").take()
        job.kill()
        while psutil.Process(job.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        began = time.monotonic()
        with RunLock(tmp_path / "run"):
            assert holder(tmp_path / "run").pid == os.getpid() and time.monotonic() - began < 1.0


def test_a_process_number_that_was_given_away_anew_is_not_the_holder(tmp_path: Path) -> None:
    """One that began a tick later is another one; a clock that was set makes no other one of it."""
    ticks = pids.began(os.getpid())
    assert ticks is not None and pids.began(2**22 + 1) is None
    leave(tmp_path, ticks=ticks - 1)
    with RunLock(tmp_path):
        assert holder(tmp_path).lives()
    leave(tmp_path, started=psutil.Process().create_time() - 3600)
    with pytest.raises(RunInUse):
        RunLock(tmp_path).take()


def test_where_processes_have_no_ticks_their_time_of_start_counts(tmp_path: Path) -> None:
    for seconds, same in ((0.5, True), (3600, False)):
        assert leave(tmp_path, ticks=None, started=psutil.Process().create_time() - seconds).lives() == same


def test_a_job_of_another_host_counts_as_gone_when_it_is_silent(tmp_path: Path) -> None:
    told: list[str] = []
    leave(tmp_path, host="node-a", place="elsewhere")
    with RunLock(tmp_path, tell=told.append, silence=0.3):
        assert holder(tmp_path).pid == os.getpid()
    assert "was left by process" in told[0] and "on node-a" in told[0] and "waiting 0 s for a sign of life" in told[0]


def test_a_job_of_another_host_that_gives_signs_of_life_holds_its_folder(tmp_path: Path) -> None:
    """What is watched is whether they come, not what time they say: clocks of hosts differ."""
    leave(tmp_path, host="node-a", place="elsewhere")
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(tmp_path / LOCK, (1e9, 1e9 + time.monotonic()))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(RunInUse, match="on node-a"):
            RunLock(tmp_path, tell=lambda line: None, silence=20.0).take()
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}'])
def test_a_lock_that_was_not_finished_is_taken_over(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text)
    with RunLock(tmp_path, silence=0.1):
        assert holder(tmp_path).lives()


@pytest.mark.parametrize("claims", [0, 1, 2])
def test_of_many_that_find_a_dead_ones_lock_one_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, claims: int
) -> None:
    """Also where some were killed while they took it over; with pauses before and after each step on the disk."""
    steps = ((runlock, "_contents"), (Path, "unlink"), (Path, "replace"))
    for owner, name in steps:
        monkeypatch.setattr(owner, name, slow(getattr(owner, name)))
    for turn in range(10):
        last = tmp_path / LOCK
        for number in range(1 + claims):
            dead = replace(Holder.here(), pid=2**22 + 1, token=f"dead {turn} {number}")
            last.write_text(json.dumps(asdict(dead)))
            last = runlock._heir(last, last.read_bytes())
        won = those_who_take([RunLock(tmp_path) for _ in range(8)])
        assert len(won) == 1 and [path.name for path in tmp_path.iterdir()] == [LOCK]
        won[0].release(tmp_path / LOCK)


def test_claims_that_were_not_finished_are_taken_over(tmp_path: Path) -> None:
    """Both files are empty: who made them was killed before it had written its name."""
    (tmp_path / LOCK).touch()
    runlock._heir(tmp_path / LOCK, b"").touch()
    with RunLock(tmp_path, silence=0.1):
        assert holder(tmp_path).lives() and [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_who_takes_a_lock_over_holds_the_folder_already(tmp_path: Path) -> None:
    """Between its claim and the lock; the refusal names it, and not the dead one."""
    leave(tmp_path, pid=2**22 + 1, token="dead")
    claim = runlock._heir(tmp_path / LOCK, (tmp_path / LOCK).read_bytes())
    claim.write_text(json.dumps(asdict(Holder.here())))
    with pytest.raises(RunInUse, match=rf"in use by another job \(process {os.getpid()} on"):
        RunLock(tmp_path).take()
    assert holder(tmp_path).token == "dead" and claim.exists()


def slow(step: Callable[..., object]) -> Callable[..., object]:
    """The same step with other jobs' steps before and after it."""

    def run(*args: object, **kwargs: object) -> object:
        time.sleep(random.choice((0, 0.004, 0.03)) * random.random())
        try:
            return step(*args, **kwargs)
        finally:
            time.sleep(0.004 * random.random())

    return run


def those_who_take(locks: list[RunLock]) -> list[RunLock]:
    """Which of these got the folder; all of them ask at once."""
    won: list[RunLock] = []
    start = threading.Barrier(len(locks))

    def take(lock: RunLock) -> None:
        start.wait()
        with suppress(RunInUse):
            lock.take()
            won.append(lock)

    threads = [threading.Thread(target=take, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won


def test_a_job_whose_folder_was_taken_over_ends(tmp_path: Path) -> None:
    """It was asleep; what it would write now would be among another job's files."""
    with another_job(tmp_path) as job:
        leave(tmp_path, host="node-b", token="another")
        assert job.wait(timeout=20) == 1 and job.stderr is not None
        assert "has been taken over by process" in (error := job.stderr.read()) and "on node-b" in error


def test_a_lock_that_was_tidied_away_comes_back(tmp_path: Path) -> None:
    with RunLock(tmp_path, beat=0.05):
        (tmp_path / LOCK).unlink()
        deadline = time.monotonic() + 10
        while not (tmp_path / LOCK).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert holder(tmp_path).pid == os.getpid()
    assert list(tmp_path.iterdir()) == []
