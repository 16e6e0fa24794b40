"""launch/mpirun.sh around an mpirun that is a few lines of shell: how it ends, whatever it is told and lacks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "launch" / "mpirun.sh"
NEEDED = ("bash", "dirname", "env", "id", "sleep", "wc")  # no setsid, which macOS lacks
MPIRUN = """#!/usr/bin/env bash
trap 'echo told; status=7' USR1
echo "started with $LOQT_SCALE_NOTICE_SECONDS"
status=
for _ in {1..200}; do
    [[ -z $status ]] || exit $status
    sleep 0.05
done
"""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


@pytest.fixture
def script(tmp_path: Path) -> Any:
    """Starts a copy of the script where there are the `NEEDED` programs and nothing else, in a session of its own."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in NEEDED:
        (programs / name).symlink_to(str(shutil.which(name)))
    (tmp_path / "launch").mkdir()
    command = [str(shutil.copy(SCRIPT, tmp_path / "launch")), "--train.steps", "1"]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return lambda: subprocess.Popen(command, env={"PATH": str(programs), "RANKS": "1"}, **pipes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_told_to_stop_it_tells_mpirun_alone_and_ends_as_that_does(
    script: Any, tmp_path: Path, number: signal.Signals
) -> None:
    """As from a terminal, whose signals reach the whole process group: mpirun gets SIGUSR1, and nothing else."""
    mpirun = tmp_path / "bin" / "mpirun"
    mpirun.write_text(MPIRUN)
    mpirun.chmod(0o755)
    with script() as process:
        assert process.stdout is not None and process.stdout.readline() == "started with inf\n"
        os.killpg(process.pid, number)
        assert process.stdout.read() == "told\n"
    assert process.returncode == 7


def test_what_cannot_be_started_is_an_error(script: Any) -> None:
    with script() as process:
        output, _ = process.communicate()
    assert process.returncode == 127 and "mpirun" in output
