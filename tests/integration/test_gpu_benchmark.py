"""benchmarks/gpu.py runs, on tiny shapes and without a GPU: nobody should find out on a rented one that it does not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
@pytest.mark.parametrize(
    "part", ["throughput", "merge", "products", "optimizers", "cap", "memory", "profile", "offload"]
)
def test_every_part_prints_its_table(part: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--quick", "--device=cpu", f"--part={part}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    kept = (ROOT / "benchmarks" / "RESULTS.md").read_bytes()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert any(words in done.stdout for words in ("| llama_micro |", "llama_micro,", "**llama_micro in")), done.stdout
    assert (ROOT / "benchmarks" / "RESULTS.md").read_bytes() == kept


def test_the_cpu_is_for_trying_only() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "write --quick --device cpu" in done.stderr


@pytest.mark.long
def test_a_short_time_is_shared_out_and_what_does_not_fit_is_said() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--quick", "--device=cpu", "--minutes=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert time.monotonic() - started < 80
    assert done.returncode == 0, done.stderr[-4000:]
    said = done.stdout.strip().splitlines()[-6:]
    assert all(("done" in line) or ("out of time" in line) or ("not begun" in line) for line in said), said
