"""Cache entries: damage is found and mended, builders are named, and what killed builds leave is removed."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from loqt_scale.data import cache
from loqt_scale.data.cache import built_once, damage, digests
from loqt_scale.errors import UserError

CONTENT = b"0123456789" * 100


def write(folder: Path) -> None:
    (folder / "a.bin").write_bytes(CONTENT)
    (folder / "b.json").write_text("{}")


def refuse(folder: Path) -> None:
    raise AssertionError("built again")


def build(folder: Path, said: list[str] | None = None) -> Path:
    return built_once(folder, write, what="making a test", say=(said if said is not None else []).append)


def test_an_entry_is_built_once_and_its_files_have_digests(tmp_path: Path) -> None:
    folder = build(tmp_path / "x" / "key")
    assert built_once(folder, refuse, what="") == folder
    assert set(digests(folder)) == {"a.bin", "b.json"} and damage(folder) is None
    assert digests(build(tmp_path / "key2")) == digests(folder)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda folder: flip(folder / "a.bin"), "a.bin is not what was written"),
        (lambda folder: os.truncate(folder / "a.bin", 10), "a.bin has 10 bytes, not 1000"),
        (lambda folder: (folder / "a.bin").unlink(), "a.bin"),
        (lambda folder: (folder / "entry.json").unlink(), "entry.json"),
        (lambda folder: (folder / "entry.json").write_text("[1"), "Error"),
        (lambda folder: (folder / "entry.json").write_text('{"a.bin": 3}'), "Error"),
    ],
)
def test_a_damaged_entry_is_built_anew_and_said(tmp_path: Path, harm, reason: str) -> None:
    folder, said = build(tmp_path / "key"), []
    harm(folder)
    build(folder, said)
    assert len(said) == 1 and "damaged" in said[0] and reason in said[0] and "making a test" in said[0]
    assert (folder / "a.bin").read_bytes() == CONTENT and damage(folder) is None


def test_a_copied_entry_is_read_through_and_taken(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(build(tmp_path / "key"), tmp_path / "copy"))
    assert built_once(copy, refuse, what="") == copy


def test_what_killed_builds_leave_is_removed(tmp_path: Path) -> None:
    word, here = "0" * 32, socket.gethostname()
    dead = [tmp_path / f"{key}.{word}@{here}.building" for key in ("key", "other")]
    living = [tmp_path / f"held.{word}@{here}.building", tmp_path / f"other.{word}@elsewhere.building"]
    forgotten = tmp_path / f"old.{word}@elsewhere.building"
    for folder in (*dead, *living, forgotten):
        folder.mkdir()
        write(folder)
    for path in (forgotten / "a.bin", forgotten / "b.json", forgotten):
        os.utime(path, (1, 1))
    with FileLock(tmp_path / "held.lock"):
        build(tmp_path / "key")
    assert not any(folder.exists() for folder in (*dead, forgotten))
    assert all(folder.exists() for folder in living)


def left_behind(folder: Path, host: str, seconds_ago: float) -> Path:
    """What an interrupted build that can go on has left."""
    left = folder.with_name(f"{folder.name}.kept@{host}.building")
    left.mkdir()
    for path in (left / "place.json", left):
        path.is_dir() or path.write_text("12")
        os.utime(path, (time.time() - seconds_ago,) * 2)
    return left


def going_on(folder: Path) -> None:
    (folder / "a.bin").write_text((folder / "place.json").read_text() if (folder / "place.json").exists() else "new")


@pytest.mark.parametrize(("host", "seconds_ago"), [(socket.gethostname(), 0.0), ("elsewhere", 200.0)])
def test_a_build_that_can_go_on_does_on_this_host_or_another(tmp_path: Path, host: str, seconds_ago: float) -> None:
    left_behind(tmp_path / "key", host, seconds_ago)
    built_once(tmp_path / "key", going_on, what="", goes_on=True)
    assert (tmp_path / "key" / "a.bin").read_text() == "12" and set(digests(tmp_path / "key")) == {"a.bin"}
    assert not list(tmp_path.glob("*.building"))


def test_a_build_that_another_host_is_at_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where locks are not shared, only its silence tells that it has ended."""
    left, said = left_behind(tmp_path / "key", "elsewhere", 100.0), []
    monkeypatch.setattr(time, "sleep", lambda _: (left / "train.npy").write_text("more"))
    built_once(tmp_path / "key", going_on, what="", goes_on=True, say=said.append)
    assert (tmp_path / "key" / "a.bin").read_text() == "new" and (left / "train.npy").exists()
    assert len(said) == 1 and "waiting up to 20 s to see whether" in said[0]


def test_what_could_go_on_is_removed_after_a_week(tmp_path: Path) -> None:
    lately, long_ago = (
        left_behind(tmp_path / "a", "here", 6 * 86400.0),
        left_behind(tmp_path / "b", "here", 8 * 86400.0),
    )
    build(tmp_path / "key")
    assert lately.exists() and not long_ago.exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from loqt_scale.data.cache import built_once
def build(folder):
    (folder / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
built_once(Path(sys.argv[1]), build, what="")
"""


def test_a_build_that_is_killed_leaves_nothing_for_good(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "key")], env=environment, check=False)
    assert len(list(tmp_path.glob("*.building"))) == 1
    build(tmp_path / "key")
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == ["key"]


def _hold(folder: str, ready: object, release: object) -> None:
    def slow(temporary: Path) -> None:
        ready.set()  # type: ignore[attr-defined]
        release.wait(20)  # type: ignore[attr-defined]
        write(temporary)

    built_once(Path(folder), slow, what="tokenizing a long book")


@pytest.mark.parametrize("same_job", [False, True])
def test_who_waits_says_for_whom_and_since_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_job) -> None:
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    if same_job:
        monkeypatch.setenv("MASTER_ADDR", "node-a")
        monkeypatch.setenv("MASTER_PORT", "1")
    holder = context.Process(target=_hold, args=(str(tmp_path / "key"), ready, release))
    holder.start()
    assert ready.wait(20)
    monkeypatch.setattr(cache, "_FIRST_WAIT", 0.2)
    said: list[str] = []

    def hear(line: str) -> None:
        said.append(line)
        release.set()

    if same_job:  # ranks of one job wait for one another as a matter of course
        release.set()
    built_once(tmp_path / "key", refuse, what="", say=hear)
    holder.join(20)
    if same_job:
        assert said == []
    else:
        year = time.strftime("%Y")
        assert len(said) == 1 and f"waiting for process {holder.pid} on {socket.gethostname()}" in said[0]
        assert f"at tokenizing a long book since {year}-" in said[0] and "key.lock" in said[0]


def test_a_full_disk_is_the_cache_folders_and_a_bug_stays_one(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device", str(folder / "a.bin"))

    with pytest.raises(UserError, match=r"cache folder .* cannot be written: No space left.*write data\.cache_dir"):
        built_once(tmp_path / "key", full, what="")
    with pytest.raises(AssertionError, match="built again"):
        built_once(tmp_path / "key", refuse, what="")
    assert not list(tmp_path.glob("*.building")) and not list(tmp_path.glob("*.builder"))
