"""Jobs that die, are told to stop, or cannot write: whatever happens, they go on to the unbroken run's losses."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.distributed.pool import RankPool
from tests.distributed.test_launchers import OURS, ROOT, executable, losses

KILLED = str(ROOT / "tests" / "distributed" / "killed.py")
FULL = str(ROOT / "tests" / "distributed" / "full.py")
TRAIN = str(ROOT / "launch" / "train.py")
STEPS = 9  # merges after steps 1 and 5 (counted from 1), saves after 2, 4, 6, 8 and 9
Job = Callable[..., list[str]]


@pytest.fixture
def settings(text_file: Path, cache_dir: Path) -> Job:
    """The command-line words of a short run in a folder."""

    def words(run_dir: Path, *more: str) -> list[str]:
        model = ["--model.preset=llama_nano", "--data.seq_len=32", "--data.max_eval_sequences=2", "--loqt.rank=8"]
        data = [f"--data.files={json.dumps([str(text_file)])}", f"--data.cache_dir={cache_dir}"]
        loop = [f"--train.steps={STEPS}", "--train.global_batch_size=4", "--train.progress=off", "--optim.lr=5e-3"]
        merges = ["--loqt.merge.gap=3", "--loqt.merge.schedule=constant", "--checkpoint.every=2"]
        return [*model, *data, *loop, *merges, f"--train.run_dir={run_dir}", *more]

    return words


def start(words: list[str], **options: object) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key not in OURS} | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen(words, cwd=ROOT, env=environment, **pipes, **options)


def finish(process: subprocess.Popen[str], seconds: float = 100.0) -> tuple[int, str]:
    """(exit status, output); the process group does not outlive it."""
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


@pytest.fixture(scope="module")
def known() -> dict[int, list[float]]:
    return {}


@pytest.fixture
def unbroken(settings: Job, known: dict[int, list[float]], tmp_path: Path) -> Callable[[int], list[float]]:
    """Losses of the run that nothing happens to."""

    def call(ranks: int) -> list[float]:
        if ranks not in known:
            run_dir = tmp_path / f"unbroken-{ranks}"
            status, output = finish(start([*launcher(ranks), TRAIN, *settings(run_dir)]))
            assert status == 0, output
            known[ranks] = losses(run_dir)
        return known[ranks]

    return call


def launcher(ranks: int, *options: str) -> list[str]:
    if ranks == 1:
        return [sys.executable]
    return [executable("torchrun"), "--standalone", "--nproc-per-node", str(ranks), *options]


@pytest.mark.parametrize(
    ("ranks", "point", "call"),
    # rank 0 takes the digests of six files in each save: the 12th is its second shard's, before it counts;
    # `_sync` runs for begun.json and its folder, then for manifest, six files and two folders of each save: the 12th
    # call is the first save's pointer
    [
        (1, "merge", 4),
        pytest.param(1, "save begins", 2, marks=pytest.mark.long),
        pytest.param(1, "save writes", 12, marks=pytest.mark.long),
        pytest.param(1, "save publishes", 3, marks=pytest.mark.long),
        pytest.param(1, "save points", 12, marks=pytest.mark.long),
        pytest.param(2, "merge", 20, marks=pytest.mark.long),
        pytest.param(2, "save writes", 12, marks=pytest.mark.long),
        pytest.param(2, "save publishes", 3, marks=pytest.mark.long),
    ],
)
def test_killed_at_the_worst_moments(
    settings: Job, unbroken: Callable[[int], list[float]], tmp_path: Path, ranks: int, point: str, call: int
) -> None:
    run_dir, marker = tmp_path / "run", tmp_path / "killed"
    words = [*launcher(ranks), KILLED, point, str(call), str(marker), *settings(run_dir)]
    status, output = finish(start(words))
    assert (status == -signal.SIGKILL if ranks == 1 else status != 0) and marker.exists(), output
    status, output = finish(start(words))
    saved_before = (point, call) not in (("merge", 4), ("save points", 12))
    assert status == 0 and ("resumed after step" in output) == saved_before, output
    assert losses(run_dir) == unbroken(ranks)


@pytest.mark.long
def test_a_killed_rank_is_named(settings: Job, tmp_path: Path) -> None:
    words = [*launcher(2), KILLED, "step", "3", str(tmp_path / "killed"), *settings(tmp_path / "run")]
    began = time.monotonic()
    status, output = finish(start(words))
    assert status != 0 and "rank      : 0" in output and "Signal 9 (SIGKILL)" in output, output
    assert time.monotonic() - began < 60, "long before parallel.timeout_seconds"


@pytest.mark.long  # the lock by itself is in tests/unit, what a start does about it in tests/integration
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_job_in_the_folder_is_refused(settings: Job, tmp_path: Path, ranks: int) -> None:
    """By the real commands; the first one loses nothing, and after `kill -9` of it the next one goes on at once."""
    run_dir = tmp_path / "run"
    words = [*launcher(ranks), TRAIN, *settings(run_dir, "--train.steps=200", "--checkpoint.every=50")]
    first = start(words)
    while not (run_dir / "checkpoints" / "latest").exists():
        time.sleep(0.05)
    job = psutil.Process(first.pid)
    processes = (job, *job.children(recursive=True))  # torchrun's ranks are in sessions of their own
    for process in processes:
        process.suspend()  # so that it is not over before the second one starts
    status, output = finish(start([*launcher(ranks), TRAIN, *settings(run_dir, "--checkpoint.resume=never")]))
    assert status != 0 and "is in use by another job (process" in output, output
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("run")] == ["run"]
    for process in processes:
        process.kill()
    first.communicate()
    status, output = finish(start(words))
    assert status == 0 and "resumed after step" in output and len(losses(run_dir)) == 200, output


@pytest.mark.long  # a minute and a half; that a killed run goes on is in the tests above
def test_torchrun_goes_on_by_itself(settings: Job, unbroken: Callable[[int], list[float]], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = [KILLED, "step", "6", str(tmp_path / "killed"), *settings(run_dir)]
    status, output = finish(start([*launcher(2, "--max-restarts", "1"), *words]))
    assert status == 0 and "Signal 9" not in output.rpartition("resumed after step 4")[2], output
    assert losses(run_dir) == unbroken(2)


@pytest.mark.parametrize(
    ("ranks", "number"),
    [
        (1, signal.SIGTERM),
        pytest.param(1, signal.SIGINT, marks=pytest.mark.long),
        pytest.param(2, signal.SIGTERM, marks=pytest.mark.long),
    ],
)
def test_told_to_stop(
    settings: Job, unbroken: Callable[[int], list[float]], tmp_path: Path, ranks: int, number: signal.Signals
) -> None:
    """Saves after the step it is in, whatever checkpoint.every says, and goes on from there."""
    run_dir = tmp_path / "run"
    words = [*launcher(ranks), TRAIN, *settings(run_dir, "--checkpoint.every=0")]
    process = start(words)
    metrics = run_dir / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("train/loss") >= 2):
        time.sleep(0.01)
    process.send_signal(number)
    status, output = finish(process)
    stopped = json.loads((run_dir / "checkpoints" / "latest").parent.joinpath(
        (run_dir / "checkpoints" / "latest").read_text().strip(), "manifest.json").read_text())["step"]  # fmt: skip
    if stopped == STEPS:
        pytest.skip("the run was over before the signal came")
    assert f"stopped after step {stopped}" in output, output
    assert ranks > 1 or status == 128 + number
    status, output = finish(start(words))
    assert status == 0 and f"resumed after step {stopped}" in output, output
    assert losses(run_dir) == unbroken(ranks)


@pytest.mark.long
@pytest.mark.parametrize("every", [False, True])
def test_a_flipped_file_is_refused(
    settings: Job, tmp_path: Path, unbroken: Callable[[int], list[float]], every: bool
) -> None:
    """One file at a time, by the real command: one line, exit status 2, nothing trained. Every file, or two of them."""
    run_dir = tmp_path / "run"
    at_once = "--checkpoint.background=false"  # or the kill may come before what step 6 saved is published
    words = [*launcher(1), KILLED, "step", "8", str(tmp_path / "killed"), *settings(run_dir), at_once]
    assert finish(start(words))[0] == -signal.SIGKILL
    (checkpoint,) = [path for path in (run_dir / "checkpoints").iterdir() if path.name == "step-00000006"]
    rows = (run_dir / "metrics.jsonl").read_text()
    documents = ("manifest.json", "config.yaml", "huggingface/tokenizer.json")
    files = [*(checkpoint / name for name in documents), *sorted(checkpoint.glob("shard-*"))]
    for path in files if every else (files[0], files[-1]):
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :])
        status, output = finish(start(words))
        assert status == 2, output
        assert "Traceback" not in output and "checkpoint.resume" in output and "damaged" in output, (path, output)
        assert (run_dir / "metrics.jsonl").read_text() == rows
        path.write_bytes(whole)
    status, output = finish(start(words))
    assert status == 0 and losses(run_dir) == unbroken(1), output


def test_no_room_for_checkpoints_does_not_end_the_run(
    settings: Job, tmp_path: Path, unbroken: Callable[[int], list[float]]
) -> None:
    """Files may not grow beyond what metrics need (as on a full disk); then a file stands where the folder should."""
    run_dir, wanted = tmp_path / "run", unbroken(1)  # first: it fills the cache of tokenized text

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    status, output = finish(start([*launcher(1), TRAIN, *settings(run_dir)], preexec_fn=limit))
    assert status == 2 and output.count("WARNING: checkpoint of step") == 3, "five saves and one at last: 1, 2, 4"
    assert "Make room: nothing has been saved, the same command starts anew" in output.splitlines()[-1]
    assert losses(run_dir) == wanted
    assert not list((run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("background", [True, False])
def test_a_rank_that_cannot_write_is_named(
    background: bool, ranks: RankPool, text_file: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """Of its three saves the second fails on rank 1: nothing of it is published, and training goes on on both."""
    common = {"data.files": [str(text_file)], "data.cache_dir": str(cache_dir), "train.run_dir": str(tmp_path / "run")}
    saves = {"checkpoint.every": 3, "checkpoint.keep_last": 9, "checkpoint.background": background, "train.steps": 9}
    task = "tests.distributed.tasks:run_with_a_bad_disk"
    told = ranks.run(2, task, **common, **saves, **{"optim.warmup_steps": 1})[0]
    assert told == [
        "WARNING: checkpoint of step 6 not saved: rank 1: OSError: [Errno 28] No space left on device; training goes "
        "on, and will try again"
    ]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("*step-*")) == [
        "step-00000003",
        "step-00000009",
    ]


@pytest.mark.parametrize("about", ["step", "merge"])
def test_ranks_that_disagree_stop_before_the_merge(
    about: str, ranks: RankPool, text_file: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """Settings and checkpoint are compared at the start (test_checkpoint.py); this is what happens on the way."""
    common = {"data.files": [str(text_file)], "data.cache_dir": str(cache_dir), "train.run_dir": str(tmp_path / "run")}
    merges = {"loqt.merge.gap": 6, "loqt.merge.schedule": "constant", "train.steps": 9, "optim.warmup_steps": 1}
    settings = {
        **common,
        **merges,
        "parallel.timeout_seconds": 5,
    }  # a rank of the pool does not end, and goes on silent
    ended = ranks.run(2, "tests.distributed.tasks:disagreeing_run", about=about, **settings)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    if about == "step":  # both find out when the losses of step 6 are summed
        assert all(end.startswith("OutOfStepError: here it is step 6, after which a merge follows") for end in ended)
        assert max(steps) == 6, "steps are counted from 1 there: the 7th, which a merge was to follow, is missing"
    else:  # rank 0, which is about to merge, finds that only it has announced that; the other loses its peer
        assert ended[0].startswith("OutOfStepError: here it is step 5, after which no merge follows (after the next: a")
        assert ended[1] != "nothing" and max(steps) == 5


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB, which one checkpoint fits on but not two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk]).returncode:
        pytest.skip("a small disk can only be mounted as root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_full_for_a_while(
    settings: Job, unbroken: Callable[[int], list[float]], small_disk: Path
) -> None:
    """Whatever fills it meanwhile: the run goes on, says so, and writes all of it when there is room again."""
    run_dir, filler = small_disk / "run", small_disk / "filler"
    process = start([*launcher(1), FULL, str(filler), "3", "6", *settings(run_dir)])
    status, output = finish(process)
    assert status == 0 and "checkpoints can be written again" in output, output
    failed = "WARNING: checkpoint of step 4 not (saved|published)"  # by what the failed one of step 2 leaves room for
    assert re.search(failed, output) and "Traceback" not in output, output
    assert losses(run_dir) == unbroken(1)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir())[-1] == f"step-{STEPS:08d}"
