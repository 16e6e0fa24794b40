"""What happens on one rank ends all: saved together where that is possible, else at once and with its reason."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from loqt_scale.strategies import LostRankError, RollCall, StoppedElsewhere
from tests.distributed.pool import RankPool, free_port
from tests.distributed.test_faults import TRAIN
from tests.distributed.test_launchers import BIN, OURS, ROOT, executable
from tests.integration.test_run import words


@pytest.fixture
def settings(text_file: Path, cache_dir: Path, tmp_path: Path) -> dict[str, Any]:
    data = {"data.files": [str(text_file)], "data.cache_dir": str(cache_dir), "train.run_dir": str(tmp_path / "run")}
    return {**data, "train.steps": 9, "loqt.merge.gap": 5, "optim.warmup_steps": 1, "parallel.timeout_seconds": 60}


def losses(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.parametrize(
    ("strategy", "step"),
    [
        ("fsdp", 7),
        pytest.param("ddp", 6, marks=pytest.mark.long),  # after which a merge follows
        pytest.param("ddp", 5, marks=pytest.mark.long),  # the step before that
        pytest.param("zero", 7, marks=pytest.mark.long),
        pytest.param("fsdp", 0, marks=pytest.mark.long),
    ],
)
def test_data_that_one_rank_cannot_read_ends_all_of_them_saved(
    strategy: str, step: int, ranks: RankPool, settings: dict[str, Any], tmp_path: Path
) -> None:
    """No rank applies the step; all save the one before it, and the run goes on to the unbroken run's losses."""
    settings = {**settings, "parallel.strategy": strategy}
    task = "tests.distributed.tasks:run_with_unreadable_data"
    ended = ranks.run(2, task, rank=1, step=step, **settings)
    told = f"the data of step {step + 1} cannot be read: rank 1: ConnectionError: the hub is away"
    assert ended == [(told, "None"), (told, "ConnectionError('the hub is away')")]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step-{step:08d}\n"
    ranks.run(2, "tests.distributed.tasks:train_run", **settings)
    ranks.run(2, "tests.distributed.tasks:train_run", **{**settings, "train.run_dir": str(tmp_path / "unbroken")})
    assert losses(tmp_path / "run") == losses(tmp_path / "unbroken")


@pytest.mark.parametrize(
    "spread",
    [
        {"parallel.strategy": "ddp"},
        pytest.param({"parallel.strategy": "zero", "parallel.zero_stage": 2}, marks=pytest.mark.long),
    ],
)
def test_an_evaluation_that_fails_on_one_rank_ends_all_of_them_saved(
    spread: dict[str, Any], ranks: RankPool, settings: dict[str, Any], tmp_path: Path
) -> None:
    """What has been trained is whole on all ranks, and nobody waits for the one that failed."""
    settings = {**settings, **spread, "train.eval_every": 3, "train.steps": 5}
    ended = ranks.run(2, "tests.distributed.tasks:run_with_failing_evaluation", rank=1, **settings)
    told = "EvaluationError: the held-out text cannot be scored: rank 1: MemoryError: no memory left"
    way = "after step 3; it is saved, and the same command goes on from there"
    assert ended == [(told, "None", way), (told, "MemoryError('no memory left')", way)]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000003\n"


def test_all_ranks_end_with_the_signal_that_one_got(ranks: RankPool, settings: dict[str, Any], tmp_path: Path) -> None:
    task, settings = "tests.distributed.tasks:run_told_to_stop", {**settings, "parallel.strategy": "ddp"}
    assert ranks.run(2, task, rank=1, number=int(signal.SIGINT), **settings) == [signal.SIGINT] * 2
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() in ("step-00000004\n", "step-00000005\n")


def test_a_mark_that_rank_0_cannot_write_is_told_on_every_rank(
    ranks: RankPool, settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "finished.json.new").symlink_to("/dev/full")
    told = ranks.run(2, "tests.distributed.tasks:run_refused", **settings, **{"parallel.strategy": "fsdp"})
    assert told[0] == told[1] and "trained and saved, but cannot be marked as finished (No space left" in told[0]


# ---- ranks as a launcher starts them, that may die: no torchrun, whose agent would end the others itself ------------


@pytest.fixture
def start(settings: dict[str, Any]) -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    started: list[subprocess.Popen[str]] = []

    def call(*of_rank: dict[str, Any], **more: Any) -> list[subprocess.Popen[str]]:
        launched = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        launched["MASTER_PORT"] = str(free_port())
        clean = {key: value for key, value in os.environ.items() if key not in OURS}
        for rank, own in enumerate(of_rank):
            environment = {**clean, **launched, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, TRAIN, *words({**settings, **more, **own})]
            pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
        return started

    yield call
    for process in started:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str], seconds: float = 150.0) -> tuple[int, str]:
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def test_a_failure_of_rank_0_at_the_start_ends_all_ranks_with_its_reason(
    start: Callable[..., list[subprocess.Popen[str]]], text_file: Path
) -> None:
    """Its run folder cannot be made; the other, which waits for that in a collective, hears of it at once."""
    began = time.monotonic()
    processes = start({}, {}, **{"train.run_dir": str(text_file / "run"), "parallel.timeout_seconds": 600})
    (_, first), (status, other) = (finish(process) for process in processes)
    assert "error: train.run_dir is" in first and "is not a folder" in first
    assert status == 2 and "error: train.run_dir is" in other and "is not a folder" in other
    assert time.monotonic() - began < 120


@pytest.mark.long
@pytest.mark.parametrize(("rank", "number"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_rank_that_is_missing_is_named(
    start: Callable[..., list[subprocess.Popen[str]]], tmp_path: Path, rank: int, number: signal.Signals
) -> None:
    """The rank that keeps the store too; a stopped one after `timeout_seconds`."""
    processes = start({}, {}, **{"train.steps": 100_000, "parallel.timeout_seconds": 15})
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("train/loss") > 2):
        assert processes[0].poll() is None
        time.sleep(0.1)
    processes[rank].send_signal(number)
    status, output = finish(processes[1 - rank])
    last = output.strip().splitlines()[-1]
    assert status == 2 and f"error: rank {rank} (process {processes[rank].pid} on " in last, output
    assert "is missing" in last


@pytest.mark.long
def test_one_rank_told_to_stop_before_all_have_come_stops_all(
    start: Callable[..., list[subprocess.Popen[str]]],
) -> None:
    processes = start({}, {}, **{"parallel.timeout_seconds": 600})
    maps = Path(f"/proc/{processes[1].pid}/maps")
    while "libtorch_python" not in maps.read_text():
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    (first, told), (other, _) = (finish(process) for process in processes)
    assert first == other == 128 + signal.SIGTERM and "stopped by SIGTERM before training" in told


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_told_to_stop_the_mpi_script_lets_the_ranks_save(
    settings: dict[str, Any], tmp_path: Path, number: signal.Signals
) -> None:
    """mpirun itself kills them a second after a SIGTERM; here they take two steps more, of over a second each."""
    executable("mpirun")
    asked = {**settings, "train.steps": 100_000, "train.global_batch_size": 1024, "train.log_every": 1}
    clean = {key: value for key, value in os.environ.items() if key not in OURS} | {"RANKS": "2"}
    clean["PATH"] = f"{BIN}:{clean['PATH']}"
    command = [str(ROOT / "launch" / "mpirun.sh"), *words(asked)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    metrics = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen(command, cwd=ROOT, env=clean, **pipes) as process:
        try:
            while not (metrics.exists() and "train/loss" in metrics.read_text()):
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.1)
            process.send_signal(number)
            status, output = finish(process)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert status == 128 + signal.SIGUSR1 and "it is saved, and the same command goes on from there" in output, output


def test_a_rank_that_outlives_the_store_is_silent() -> None:
    """Rank 0, which keeps it, leaves first: the other's thread and its own last word find nobody, and say nothing."""
    code = (
        "import os, time\nfrom loqt_scale.training.together import one_for_all\n"
        "with one_for_all(60):\n    time.sleep(4 * int(os.environ['RANK']))\n"
    )
    launched = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    clean = {key: value for key, value in os.environ.items() if key not in OURS} | launched
    environments = [{**clean, "MASTER_PORT": str(port), "RANK": rank} for port in [free_port()] for rank in "01"]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", code], env=each, **pipes) for each in environments]
    assert [finish(process) for process in both] == [(0, ""), (0, "")]


# ---- the roll call by itself ----------------------------------------------------------------------------------------


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RollCall]]:
    """Two ranks of one process: each has an entry and a thread of its own."""
    from torch.distributed import HashStore

    from loqt_scale.strategies import roll_call

    for name, seconds in {"PULSE_SECONDS": 0.05, "SILENT_SECONDS": 0.4, "LOOK_SECONDS": 1.0}.items():
        monkeypatch.setattr(roll_call, name, seconds)
    store = HashStore()
    calls = [RollCall(store, rank, 2, timeout_seconds=30, keeps_store=rank == 0) for rank in range(2)]
    calls[0]._publish(store)
    calls[1].start()
    calls[0].start()
    yield calls
    for call in calls:
        call.end("done")
        call.close()


def test_all_is_well(two: list[RollCall]) -> None:
    assert two[0].blame() is None and two[1].blame() is None


def test_who_has_failed_is_blamed_not_who_has_lost_it(two: list[RollCall]) -> None:
    two[1].end("lost")
    assert two[0].blame() is None
    two[1].end("failed", "OSError: no such file")
    error = two[0].blame()
    assert isinstance(error, LostRankError) and f"rank 1 (process {os.getpid()} on" in str(error)
    assert "has ended: OSError: no such file" in str(error)


def test_a_rank_told_to_stop_stops_the_others(two: list[RollCall]) -> None:
    two[0].end("stopped", number=15)
    error = two[1].blame()
    assert isinstance(error, StoppedElsewhere) and error.number == 15


def test_silence_is_blamed(two: list[RollCall]) -> None:
    two[1]._closed.set()  # its thread ends without a word
    error = two[0].blame()
    assert error is not None and "rank 1" in str(error) and "is missing" in str(error)


def test_ranks_that_do_not_come_are_named() -> None:
    from torch.distributed import HashStore

    call = RollCall(HashStore(), 0, 3, timeout_seconds=0.2, keeps_store=True)
    with pytest.raises(LostRankError, match=r"rank 1, rank 2 of 3 did not come"):
        call.start()
