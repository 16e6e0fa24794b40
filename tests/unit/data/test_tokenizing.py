"""Local corpora tokenized by processes: what one process does at once, whatever interrupts it; bounded in memory."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loqt_scale.data import token_store, tokenizing
from loqt_scale.data.corpora import HeldInMemory, LocalText, files_text
from loqt_scale.data.token_store import TokenStore, holdout_threshold, tokenized
from loqt_scale.data.tokenizers import ByteTokenizer
from loqt_scale.data.tokenizing import document_hash
from loqt_scale.errors import UserError

DOCUMENTS = [f"document number {i} " + "x" * (i * 7 % 90) for i in range(400)]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents in five files of every kind."""
    folder = tmp_path_factory.mktemp("texts")
    parts = [DOCUMENTS[start : start + 80] for start in range(0, 400, 80)]
    lines = ["".join(json.dumps({"text": text, "n": [text]}) + "\n" for text in part).encode() for part in parts]
    (folder / "0.txt").write_text("\n\n".join(parts[0]))
    (folder / "1.jsonl.gz").write_bytes(gzip.compress(lines[1][:2000]) + gzip.compress(lines[1][2000:]))
    (folder / "2.jsonl.zst").write_bytes(pa.compress(lines[2][:2000], "zstd", asbytes=True))
    with (folder / "2.jsonl.zst").open("ab") as file:  # two frames, as pzstd writes them
        file.write(pa.compress(lines[2][2000:], "zstd", asbytes=True))
    pq.write_table(pa.table({"n": range(80), "text": parts[3]}), folder / "3.parquet")
    (folder / "4.json").write_text(json.dumps([{"text": text} for text in parts[4]]))
    return folder


def expected(text: LocalText) -> list[list[int]]:
    """Training and held-out tokens, by the plainest program."""
    sides: list[list[int]] = [[], []]
    threshold = holdout_threshold(text, 0.2)
    for document in text.documents():
        sides[document_hash(document) < threshold] += [*document.encode(), 256]
    return sides


def build(text: LocalText, cache_dir: Path) -> TokenStore:
    return tokenized(text, ByteTokenizer(), eval_fraction=0.2, cache_dir=cache_dir)


KILLED = """
import multiprocessing, os, signal, sys
from pathlib import Path
from loqt_scale.data import token_store, tokenizing
from loqt_scale.data.corpora import files_text
from loqt_scale.data.token_store import tokenized
from loqt_scale.data.tokenizers import ByteTokenizer

tokenizing._GROUP_CHARS, tokenizing._SAVE_SECONDS = 700, 0.0
tokenizing.processes_for = lambda size: 2
save, saved, groups, read = tokenizing._save, 0, tokenizing._groups, 0

def counted(*arguments):
    global read
    for group in groups(*arguments):
        read += 1
        yield group

def deadly(*arguments):
    global saved
    save(*arguments)
    saved += 1
    if saved == int(sys.argv[3]):
        print(read - saved, *(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

tokenizing._save, tokenizing._groups = deadly, counted
tokenized(files_text([sys.argv[1]], "text"), ByteTokenizer(), eval_fraction=0.2, cache_dir=Path(sys.argv[2]))
"""


def test_processes_and_a_kill_change_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A script without a main guard, killed while two processes tokenize for it; nothing is tokenized twice."""
    script, cache_dir = tmp_path / "script.py", tmp_path / "cache"
    script.write_text(KILLED)
    words, environment = [sys.executable, str(script), str(folder), str(cache_dir), "20"], {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    ahead, *children = [int(word) for word in done.stdout.split()]
    assert len(children) == 2 and ahead <= 5, "two groups a process wait, and one comes"
    (left,) = (cache_dir / "tokens").glob("*.kept@*.building")
    place = json.loads((left / "place.json").read_text())
    assert place["place"]["part"] == 2 and place["train"]["documents"] + place["eval"]["documents"] > 160
    text = files_text([str(folder)], "text")
    (part := text.parts[1]).documents = lambda: pytest.fail("a file that was done is read again")  # type: ignore
    made = build(text, cache_dir)
    del part.documents
    assert [made.train.tolist(), made.eval.tolist()] == expected(text)
    assert "goes on after" in capsys.readouterr().err
    assert sorted(path.name for path in (cache_dir / "tokens").iterdir() if path.suffix != ".lock") == [left.name[:32]]
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(psutil.pid_exists(pid) for pid in children), "they end with their parent"


class Breaking(HeldInMemory):
    """A part whose passes end early, as by Ctrl-C: after so many documents each."""

    breaks: list[int]

    def documents(self) -> Iterator[str]:
        after = self.breaks.pop() if self.breaks else None
        for number, document in enumerate(self.texts):
            if number == after:
                raise KeyboardInterrupt
            yield document


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, 100), max_size=4), st.sampled_from([1, 60, 500]), st.integers(1, 130))
def test_builds_go_on_wherever_they_were_interrupted(
    tmp_path_factory: pytest.TempPathFactory, breaks: list[int], group: int, cut: int
) -> None:
    cache_dir = tmp_path_factory.mktemp("cache")
    parts = [Breaking(DOCUMENTS[:cut]), Breaking([]), Breaking(DOCUMENTS[cut:130])]
    for part in parts:
        object.__setattr__(part, "breaks", [])
    text = LocalText(name="a test", key="key", parts=parts)
    whole = expected(text)
    with pytest.MonkeyPatch.context() as patched:
        threshold = holdout_threshold(text, 0.2)
        patched.setattr(token_store, "holdout_threshold", lambda text, fraction: threshold)  # one pass less to break
        patched.setattr(tokenizing, "_GROUP_CHARS", group)
        patched.setattr(tokenizing, "_SAVE_SECONDS", 0.0)
        patched.setattr(os, "fsync", lambda _: None)  # no power fails here
        patched.setattr(tokenizing, "_SKIPPED_AT_ONCE", 7)
        for number, after in enumerate(breaks):
            object.__setattr__(parts[number % 2 * 2], "breaks", [after])
            with suppress(KeyboardInterrupt):
                build(text, cache_dir / "one")
        for part in parts:
            part.breaks.clear()
        made = build(text, cache_dir / "one")
        again = build(text, cache_dir / "two")
    assert [made.train.tolist(), made.eval.tolist()] == whole
    assert (made.train_digest, made.eval_documents) == (again.train_digest, again.eval_documents)


def interrupted(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[LocalText, Path]:
    """A corpus whose build was interrupted, and what is left of it."""
    monkeypatch.setattr(tokenizing, "_GROUP_CHARS", 700)
    monkeypatch.setattr(tokenizing, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    part = Breaking(DOCUMENTS)
    object.__setattr__(part, "breaks", [200, 10**6])  # the second pass; the first one chooses what is held out
    text = LocalText(name="a test", key="key", parts=[part])
    with pytest.raises(KeyboardInterrupt):
        build(text, cache_dir)
    (left,) = (cache_dir / "tokens").glob("*.kept@*.building")
    return text, left


@pytest.mark.parametrize(
    ("name", "content"),
    [("train.npy", None), ("train.npy", b""), ("eval.npy", b"x" * 9000), ("place.json", b"{}"), ("place.json", b"[1")],
)
def test_what_is_damaged_is_not_gone_on_with(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes | None,
) -> None:
    text, left = interrupted(tmp_path, monkeypatch)
    if content is None:  # one bit
        whole = bytearray((left / name).read_bytes())
        whole[500] ^= 1
        content = bytes(whole)
    (left / name).write_bytes(content)
    made = build(text, tmp_path)
    assert [made.train.tolist(), made.eval.tolist()] == expected(text)
    assert "begins anew: what was left of it is damaged" in capsys.readouterr().err


def test_another_writer_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, _ = interrupted(tmp_path, monkeypatch)
    finish = tokenizing._finish

    def meddled(folder: Path, files: dict[str, tokenizing.TokenFile]) -> None:
        for file in files.values():
            file.sync()
        with (folder / "train.npy").open("r+b") as other:
            other.seek(400)
            other.write(b"other")
        finish(folder, files)

    monkeypatch.setattr(tokenizing, "_finish", meddled)
    with pytest.raises(UserError, match=r"train\.npy does not hold .* another machine has, too"):
        build(text, tmp_path)
    monkeypatch.undo()
    made = build(text, tmp_path)
    assert [made.train.tolist(), made.eval.tolist()] == expected(text)


def test_an_interrupted_build_goes_on_after_a_full_disk_and_not_after_bad_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(error: Exception) -> Iterator[str]:
        yield from DOCUMENTS[:300]
        raise error

    monkeypatch.setattr(tokenizing, "_GROUP_CHARS", 700)
    for error, kept in ((OSError(28, "No space left on device"), 1), (UserError("no column"), 0)):
        part = HeldInMemory([])
        object.__setattr__(part, "documents", lambda error=error: failing(error))
        with pytest.raises(UserError, match=r"No space left|no column"):
            build(LocalText(name="a test", key=str(kept), parts=[part]), tmp_path / str(kept))
        assert len(list((tmp_path / str(kept) / "tokens").glob("*.kept@*.building"))) == kept


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "_GROUP_CHARS", 10_000)
    peaks = []
    for size in (1, 8):
        path = tmp_path / f"{size}.txt"
        path.write_text("\n\n".join(f"{i} " + "words " * 20 for i in range(size * 800)))
        text = files_text([str(path)], "text")
        tracemalloc.start()
        build(text, tmp_path / "cache")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert path.stat().st_size > 800_000 and peaks[1] < 1.3 * peaks[0] + 50_000, peaks


def test_how_far_it_is_and_the_time_left_are_shown(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line now and then in a log file, a bar on a terminal."""
    monkeypatch.setattr("loqt_scale.data.reading_bar._FIRST_LINE", 0.0)
    monkeypatch.setattr("loqt_scale.data.reading_bar._NEXT_LINES", 0.0)
    monkeypatch.setattr("loqt_scale.data.reading_bar._BAR_SECONDS", 0.0)
    monkeypatch.setattr(tokenizing, "_GROUP_CHARS", 2000)
    text = files_text([str(folder)], "text")
    build(text, tmp_path / "log")
    lines = capsys.readouterr().err.splitlines()
    shares = [int(line.split("first: ")[1].split("): ")[1].split("%")[0]) for line in lines]
    assert shares == sorted(shares) and len(set(shares)) >= 4 and shares[-1] == 100, lines
    assert all(line.startswith("tokenizing 5 files") and " left, " in line and "B/s]" in line for line in lines)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    build(text, tmp_path / "terminal")
    bar = capsys.readouterr().err
    assert "100%" in bar and " left, " in bar and "\r" in bar


def test_other_processes_tokenize_what_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert [tokenizing.processes_for(size) for size in (10**6, 10**8)] == [1, 6]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(256)), raising=False)
    assert tokenizing.processes_for(10**11) == 64
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    assert tokenizing.processes_for(10**11) == 1, "it may have no children"


def test_large_files_of_tokens_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loqt_scale.data.token_files import TokenFile

    monkeypatch.setattr("loqt_scale.data.token_files._BLOCK_BYTES", 10)
    file = TokenFile(tmp_path / "a.npy", np.dtype("<u2"))
    file.append(np.arange(70), 3)
    file.close()
    again = TokenFile(tmp_path / "a.npy", np.dtype("<u2"), file.written)
    again.append(np.arange(5), 1)
    again.finish()
    assert np.load(tmp_path / "a.npy").tolist() == [*range(70), *range(5)] and again.written.documents == 4
