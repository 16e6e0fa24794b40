"""Folders that one process builds while the others wait, and that are verified before they are used.

    KEY/                        an entry: its files, and entry.json, which lists them with their digests
    KEY.lock                    held by who builds the entry
    KEY.builder                 who that is, for those who wait
    KEY.WORD@HOST.building      what it is building; one rename makes it KEY/
    KEY.kept@HOST.building      the same, of a build that can go on where it was interrupted

So an interrupted build leaves nothing that looks finished; the next one removes what it leaves, or goes on with it. An
entry that is not as it was written is built anew. A file whose size, times and inode are still those of the day it was
written is taken for whole; else it is read through once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from loqt_scale.errors import UserError, explained
from loqt_scale.process.environment import job_label

Say = Callable[[str], None]

PLACE = "place.json"
"""In a build that can go on: where it is. No part of the entry."""

_ENTRY = "entry.json"
_BUILDING = re.compile(r"(?P<key>[^.]+)\.(?P<word>[0-9a-f]{32}|kept)@(?P<host>.+)\.building")
_FIRST_WAIT, _NEXT_WAITS = 5.0, 300.0  # seconds after which a waiting process says for whom
_FORGOTTEN = 86400.0  # seconds after which what another host has not touched is what a killed build left
_KEPT = 7 * 86400.0  # the same of a build that could go on, on any host
_SILENT = 120.0  # one that goes on touches its folder more often than that


class InterruptedBuildError(UserError):
    """What has stopped a build, and says nothing about its text: what has been built is kept."""


def say_on_stderr(line: str) -> None:
    """Prints a line for people."""
    print(line, file=sys.stderr, flush=True)


def built_once(
    folder: Path, build: Callable[[Path], None], *, what: str, goes_on: bool = False, say: Say = say_on_stderr
) -> Path:
    """Returns `folder`, made by one process's `build(temporary folder)` if it is not there or not whole.

    Args:
        folder: The entry.
        build: Writes the entry's files.
        what: For people: what is built.
        goes_on: `build` may find the temporary folder as an interrupted call has left it. It keeps its place there in
            `PLACE`, and writes something every few seconds.
        say: Gets a line when an entry is damaged, or when another job holds things up.

    Raises:
        UserError: The folder cannot be written; what `build` raises for people.
    """
    if folder.is_dir() and damage(folder) is None:
        return folder
    problem = f"the cache folder {folder.parent} cannot be written"
    with explained(problem, "write data.cache_dir: FOLDER", of=(OSError, NotImplementedError)):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, what, say):
            if folder.is_dir() and (found := damage(folder)) is not None:
                say(f"WARNING: the cache entry {folder} of {what} is damaged ({found}); it is built anew")
                _remove(folder)
            if not folder.is_dir():  # else another process has built it while we waited
                _sweep(folder)
                _build_and_rename(folder, build, _kept(folder, say) if goes_on else None)
    return folder


def digests(folder: Path) -> dict[str, str]:
    """The digests of an entry's files by name, as they were written."""
    return {name: str(fact["digest"]) for name, fact in _facts(folder).items()}


def damage(folder: Path) -> str | None:
    """What is wrong with an entry; None if it is as it was written."""
    try:
        facts = _facts(folder)
        return next(filter(None, (_file_damage(folder / name, fact) for name, fact in facts.items())), None)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def _facts(folder: Path) -> dict[str, dict[str, Any]]:
    facts: dict[str, dict[str, Any]] = json.loads((folder / _ENTRY).read_text(encoding="utf-8"))
    return facts


def _file_damage(path: Path, fact: dict[str, Any]) -> str | None:
    stamp = _stamp(path)
    if stamp == fact["stamp"]:
        return None
    if stamp[0] != fact["stamp"][0]:
        return f"{path.name} has {stamp[0]} bytes, not {fact['stamp'][0]}"
    return None if _digest(path) == fact["digest"] else f"{path.name} is not what was written"


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _build_and_rename(folder: Path, build: Callable[[Path], None], kept: Path | None) -> None:
    # Two machines that share a cache folder may both get here where the file system's locks are not shared: hence a
    # temporary name of our own, and no complaint if the other one's rename came first.
    temporary = kept or _temporary(folder, uuid.uuid4().hex)
    temporary.mkdir(exist_ok=kept is not None)
    keep = kept is not None
    try:
        build(temporary)
        files = sorted(path for path in temporary.iterdir() if path.name not in (PLACE, _ENTRY))
        facts = {path.name: {"digest": _digest(path), "stamp": _stamp(path)} for path in files}
        (temporary / _ENTRY).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        (temporary / PLACE).unlink(missing_ok=True)
        try:
            temporary.replace(folder)
        except OSError:
            keep = keep and not folder.is_dir()
            if not folder.is_dir():
                raise
    except Exception as error:
        keep = keep and isinstance(error, OSError | InterruptedBuildError)
        raise
    finally:
        if not keep:
            shutil.rmtree(temporary, ignore_errors=True)


def _temporary(folder: Path, word: str) -> Path:
    return folder.with_name(f"{folder.name}.{word}@{socket.gethostname()}.building")


def _kept(folder: Path, say: Say) -> Path:
    """Where a build that can go on works: what one has left, on this host or on another, or a name that is free."""
    ours = _temporary(folder, "kept")
    others = [left for left in folder.parent.glob(f"{folder.name}.kept@*.building") if left != ours]
    for left in others if not ours.exists() else []:
        if _falls_silent(left, say):
            with suppress(OSError):  # another one was faster
                left.replace(ours)
                break
    return ours


def _falls_silent(left: Path, say: Say) -> bool:
    """Whether nobody works in a folder. Where locks are not shared, another host may."""
    before = _seconds_since_touched(left)
    if before < _SILENT:
        say(f"waiting up to {_SILENT - before:.0f} s to see whether {left} is still being built")
    while (now := _seconds_since_touched(left)) < _SILENT:
        if now < before:
            return False
        before = now
        time.sleep(min(1.0, _SILENT / 10))
    return True


def _remove(folder: Path) -> None:
    """Removes an entry: by one rename first, so that nobody sees half of it."""
    aside = _temporary(folder, uuid.uuid4().hex)
    folder.replace(aside)
    shutil.rmtree(aside, ignore_errors=True)


# ---- who builds, and what is left of builds that were killed ---------------------------------------------------------


@contextmanager
def _locked(folder: Path, what: str, say: Say) -> Iterator[None]:
    """Holds the entry's lock; while another job holds it, says so now and then."""
    lock, builder = FileLock(_lock_file(folder.parent, folder.name)), folder.with_name(f"{folder.name}.builder")
    wait, begin = _FIRST_WAIT, time.monotonic()
    while True:
        try:
            lock.acquire(timeout=wait)
            break
        except Timeout:
            if (line := _waiting_line(builder)) is not None:
                say(f"waiting for {line} ({time.monotonic() - begin:.0f} s so far; the lock is {lock.lock_file})")
            wait = _NEXT_WAITS
    try:
        _write_builder(builder, what)
        yield
    finally:
        builder.unlink(missing_ok=True)
        lock.release()


def _lock_file(parent: Path, key: str) -> Path:
    return parent / f"{key}.lock"


def _write_builder(path: Path, what: str) -> None:
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    facts = {"what": what, "host": socket.gethostname(), "process": os.getpid(), "since": since, "job": job_label()}
    with suppress(OSError):  # it is for people only
        path.write_text(json.dumps(facts) + "\n", encoding="utf-8")


def _waiting_line(path: Path) -> str | None:
    """Who builds what, and since when; None if it is a rank of this job."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["job"] is not None and facts["job"] == job_label():
            return None
        return (
            f"process {facts['process']} on {facts['host']}, which has been at {facts['what']} since {facts['since']}"
        )
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"


def _sweep(folder: Path) -> None:
    """Removes what killed builds have left beside an entry, whose lock we hold."""
    for left in folder.parent.glob("*.building"):
        found = _BUILDING.fullmatch(left.name)
        if found is not None and found["word"] == "kept":
            abandoned = found["key"] != folder.name and _seconds_since_touched(left) > _KEPT
        elif found is None or found["host"] != socket.gethostname():
            abandoned = _seconds_since_touched(left) > _FORGOTTEN
        else:  # on this host, locks tell
            abandoned = found["key"] == folder.name or _is_free(_lock_file(folder.parent, found["key"]))
        if abandoned:
            shutil.rmtree(left, ignore_errors=True)


def _seconds_since_touched(folder: Path) -> float:
    with suppress(OSError):
        return time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    return 0.0


def _is_free(path: Path) -> bool:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    lock.release()
    return True
