"""Files and a console that outlast a full disk, a removed folder, a closed pipe."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loqt_scale.metrics import METRICS_FILE, MetricsWriter, Reminder
from loqt_scale.metrics.lasting import Backlog, LastingFile
from tests.unit.metrics.test_metrics import read_board, read_lines


@given(
    records=st.lists(st.binary(min_size=1, max_size=9), max_size=20),
    room=st.lists(st.integers(min_value=0, max_value=12), max_size=60),
)
def test_a_backlog_writes_everything_once_and_in_order(records: list[bytes], room: list[int]) -> None:
    """A disk that takes so many bytes of each write, or none; and has room in the end."""
    disk = bytearray()

    def write(data: bytes) -> int:
        takes = room.pop() if room else len(data)
        if takes == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        disk.extend(data[:takes])
        return min(takes, len(data))

    backlog = Backlog(write)
    for record in records:
        backlog.add(record)
        backlog.flush()
    while backlog.flush() is not None:
        pass
    assert bytes(disk) == b"".join(records) and len(backlog) == 0


def test_a_backlog_is_bounded_and_keeps_a_coarser_curve() -> None:
    def full(data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    disk: list[bytes] = []
    backlog = Backlog(full, limit=100)
    for number in range(200):
        backlog.add(b"%04d\n" % number)
    assert backlog.flush() is not None and len(backlog) <= 20 and len(backlog) + backlog.given_up == 200
    backlog._write = lambda data: disk.append(data) or len(data)  # type: ignore[func-returns-value]
    assert backlog.flush() is None
    numbers = [int(record) for record in disk]
    assert numbers[0] == 0 and numbers == sorted(numbers) and numbers[-1] >= 198


def test_a_reminder_speaks_at_growing_distances() -> None:
    told: list[str] = []
    reminder = Reminder(told.append)
    reminder.over("fine")
    for number in range(1, 101):
        reminder.trouble(f"no {number}.")
    reminder.over("fine again")
    assert [int(text.split("no ")[1].split(".")[0]) for text in told[:-1]] == [1, 2, 4, 8, 16, 32, 64]
    assert told[-1] == "fine again"


def test_metrics_wait_for_room_in_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the disk is full nothing is raised; afterwards both files hold what they would hold without it."""
    told: list[str] = []
    real, full = os.write, False

    def write(descriptor: int, data: bytes) -> int:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr("loqt_scale.metrics.lasting.os.write", write)
    with MetricsWriter(tmp_path, tell=told.append) as writer:
        for step in range(1, 21):
            full = 5 <= step < 15
            writer.log(step, {"a": step / 2, "b": 1.0})
    assert [(line["step"], line["a"]) for line in read_lines(tmp_path)] == [(step, step / 2) for step in range(1, 21)]
    assert read_board(tmp_path)["a"] == [(step, step / 2) for step in range(1, 21)]
    about = [text for text in told if METRICS_FILE in text]
    assert len(about) == 5, about  # at the 1st, 2nd, 4th and 8th failure, and when it was over
    assert "training goes on" in about[0] and "can be written again" in about[-1]


def test_a_file_whose_folder_goes_and_comes_back(tmp_path: Path) -> None:
    """Removed: made anew. Folder replaced by another (a disk unmounted): nothing is written there."""
    told: list[str] = []
    folder, away = tmp_path / "run", tmp_path / "away"
    folder.mkdir()
    file = LastingFile(folder / "a", told.append)
    file.write(b"1\n")
    (folder / "a").unlink()
    file.write(b"2\n")
    assert (folder / "a").read_bytes() == b"2\n"
    (folder / "a").unlink()
    folder.rename(away)
    folder.mkdir()
    file.write(b"3\n")
    assert not list(folder.iterdir()) and "another folder" in told[0]
    folder.rmdir()
    away.rename(folder)
    file.write(b"4\n")
    assert (folder / "a").read_bytes() == b"3\n4\n"
    file.close()
    file.close()


def test_what_is_never_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    file = LastingFile(tmp_path / "a", told.append)

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("loqt_scale.metrics.lasting.os.write", full)
    for _ in range(3):
        file.write(b"1\n")
    file.close()
    assert "its last 3 records are lost" in told[-1]


def test_later_lines_are_cut_off_without_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"step": step}) + "\n" for step in range(5)]
    (tmp_path / METRICS_FILE).write_text("".join(lines) + '{"step": 5, "a')

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    MetricsWriter(tmp_path, resume_step=2).close()
    assert [line["step"] for line in read_lines(tmp_path)] == [0, 1, 2]


def test_a_console_that_takes_nothing_ends_nothing() -> None:
    """A full disk behind standard output, then a reader that has gone; one process, since loading torch takes long."""
    code = """
import os, sys
from loqt_scale.metrics import Console
full = os.open("/dev/full", os.O_WRONLY)
before = os.dup(1)
os.dup2(full, 1)
console = Console()
console.line("waits")
os.dup2(before, 1)
console.line("comes after it")
read_end, write_end = os.pipe()
os.close(read_end)
os.dup2(write_end, 1)
console.line("nobody reads this")
console.line("nor this")
print("a library that prints")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout == "waits\ncomes after it\n"
    assert done.stderr == "WARNING: standard output is closed (Broken pipe); the work goes on without it\n"
