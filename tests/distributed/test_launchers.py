"""Every launcher for real, on 2 CPU ranks, as a user types it: same losses, no chatter, no environment variable.

Under `torchrun --nnodes 2` and `deepspeed --hostfile` each of the two "nodes" is a launcher process of its own that
starts one rank.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.distributed.pool import free_port
from tests.distributed.tasks import SMALL_RUN

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PYTHON = sys.executable
# what this test's own process has set, and a user would not
OURS = ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
MPI = ("--oversubscribe", *(("--allow-run-as-root",) if os.geteuid() == 0 else ()))

Losses = list[float]


def executable(name: str) -> str:
    """The program in this interpreter's environment, else on the PATH."""
    found = BIN / name if (BIN / name).exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return str(found)


def run_together(commands: Sequence[Sequence[str]], seconds: float = 120.0) -> list[str]:
    """Runs commands side by side to their end; returns what each wrote to stdout. None outlives the test."""
    environment = {key: value for key, value in os.environ.items() if key not in OURS}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = [
        subprocess.Popen(words, cwd=ROOT, env=environment, text=True, start_new_session=True, **pipes)
        for words in commands
    ]
    try:
        outputs = [process.communicate(timeout=seconds) for process in running]
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    for process, (out, err) in zip(running, outputs, strict=True):
        assert process.returncode == 0, f"{process.args} ended with {process.returncode}:\n{out[-2000:]}\n{err[-4000:]}"
    return [out for out, _ in outputs]


@pytest.fixture
def job(tmp_path: Path, text_file: Path, cache_dir: Path) -> Callable[..., list[str]]:
    """The words of a short run, from `launch/train.py` on."""

    def words(strategy: str, *more: str) -> list[str]:
        settings = {**SMALL_RUN, "train.steps": 4, "optim.warmup_steps": 1, "loqt.merge.gap": 2}
        settings |= {"data.files": [str(text_file)], "data.cache_dir": str(cache_dir), "parallel.strategy": strategy}
        settings |= {"train.run_dir": str(tmp_path / "run")}
        options = [
            f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()
        ]
        return ["launch/train.py", *options, *more]

    return words


def losses(run_dir: Path) -> Losses:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.fixture(scope="module")
def known() -> dict[str, Losses]:
    return {}


@pytest.fixture
def expected(known: dict[str, Losses], job: Callable[..., list[str]], tmp_path: Path) -> Losses:
    """Losses of plain `python launch/train.py`."""
    if not known:
        run_together([[PYTHON, *job("auto", "--train.run_dir", str(tmp_path / "single"))]])
        known["single"] = losses(tmp_path / "single")
        assert len(known["single"]) == 4
    return known["single"]


LAUNCHERS = {
    "torchrun": lambda: [executable("torchrun"), "--standalone", "--nproc-per-node", "2"],
    "deepspeed": lambda: [executable("deepspeed"), "--master_port", str(free_port()), "--num_gpus", "2"],
    "mpirun": lambda: [executable("mpirun"), *MPI, "-np", "2", PYTHON],
}


@pytest.mark.parametrize(
    ("launcher", "strategy"),
    [
        ("torchrun", "fsdp"),
        ("deepspeed", "zero"),
        ("mpirun", "fsdp"),
        *(
            pytest.param(*pair, marks=pytest.mark.long)
            for pair in (("torchrun", "zero"), ("mpirun", "zero"), ("deepspeed", "ddp"))
        ),
    ],
)
def test_launcher(
    launcher: str, strategy: str, job: Callable[..., list[str]], expected: Losses, tmp_path: Path
) -> None:
    stage = ["--parallel.zero_stage", "2"] if strategy == "zero" else []
    (out,) = run_together([[*LAUNCHERS[launcher](), *job(strategy, *stage)]])
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-4)
    # the launcher may speak (`deepspeed` does, with a time in brackets), the ranks only our own lines
    ours = ("model ", "data ", "step ", "ranks ", "rates ", "eval at", "merge ", "held-out", "metrics", "TensorBoard")
    ours += ("WARNING: the merge kept",)  # at rank 8 and this rate
    # torchrun and mpirun say nothing themselves
    foreign = [line for line in out.splitlines() if line.strip() and not line.startswith(ours)]
    assert all(launcher == "deepspeed" and line.startswith("[20") for line in foreign), foreign


@pytest.mark.long  # each of the two nodes starts a launcher and a rank
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_nodes(launcher: str, job: Callable[..., list[str]], expected: Losses, tmp_path: Path) -> None:
    """One launcher a node, one rank each, no ssh."""
    port = str(free_port())
    hosts = tmp_path / "hosts"
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")
    starts = {
        "torchrun": lambda node: [
            executable("torchrun"), "--nnodes", "2", "--node-rank", node, "--nproc-per-node", "1",
            "--master-addr", "127.0.0.1", "--master-port", port,
        ],
        "deepspeed": lambda node: [
            executable("deepspeed"), "--hostfile", str(hosts), "--no_ssh", "--node_rank", node,
            "--master_addr", "127.0.0.1", "--master_port", port,
        ],
    }  # fmt: skip
    run_together([[*starts[launcher](node), *job("zero", "--parallel.zero_stage", "1")] for node in ("0", "1")])
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-4)


def test_a_wrong_setting_is_said_once_and_ends_all_ranks(job: Callable[..., list[str]]) -> None:
    words = [executable("mpirun"), *MPI, "-np", "2", PYTHON, *job("zero", "--loqt.rnk", "8")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.count("unknown key 'loqt.rnk'; did you mean 'loqt.rank'?") == 1
