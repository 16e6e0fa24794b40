"""A Ctrl-C while the libraries load: one line, status 130, however many follow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_ctrl_c_while_the_libraries_load(tmp_path: Path) -> None:
    """The first library that takes long is being loaded, and swallows what interrupts it, as careless ones do."""
    slow = "import pathlib, time\npathlib.Path(__file__).with_name('loading').touch()\n"
    slow += "try:\n    time.sleep(60)\nexcept BaseException:\n    pass\n"
    (tmp_path / "jsonargparse.py").write_text(slow)
    environment = {key: value for key, value in os.environ.items() if key != "LOCAL_RANK"}
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{ROOT}"
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--train.steps", "1"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until = time.monotonic() + 120
    while not (tmp_path / "loading").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.03)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, "launch/train.py: error: interrupted\n")
