"""benchmarks/faults.py in short: what ended badly once, and a few faults by chance, end well and lose no step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def campaign(results: Path, *words: str) -> dict[str, str]:
    """Runs a campaign; what went wrong by case, empty where nothing did."""
    command = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), "--results", str(results), *words]
    kept = (ROOT / "benchmarks" / "RESULTS.md").read_bytes()
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert results.exists(), done.stderr[-4000:]
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    bad = {f"{row['number']} {row['layout']} {row['kind']}: {row['variant']}": row["bad"] for row in rows}
    assert done.returncode == any(bad.values()), done.stderr[-4000:]
    assert (ROOT / "benchmarks" / "RESULTS.md").read_bytes() == kept
    return bad


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="its ranks are forks that die with their parent")
def test_what_ended_badly_once_and_a_few_others(tmp_path: Path) -> None:
    bad = campaign(tmp_path / "results.jsonl", "--known", "--quick", "--count=2")
    assert len(bad) >= 16 and not any(bad.values()), {name: text for name, text in bad.items() if text}


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="its ranks are forks that die with their parent")
def test_forty_faults_on_every_layout(tmp_path: Path) -> None:
    bad = campaign(tmp_path / "results.jsonl", "--count=40", "--seed=1")
    assert len(bad) == 40 and not any(bad.values()), {name: text for name, text in bad.items() if text}
