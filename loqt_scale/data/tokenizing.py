"""A local corpus tokenized by several processes, in memory that does not grow with it, in the order of its documents.

    this process      reads documents in groups of a megabyte, of which two a process wait
    the others        tokenize a group, and part it into training and held-out documents
    this process      appends what comes back, in order, and keeps its place every few seconds (place.json)

A build that was killed goes on at its last place: files before it are not read again, documents of the file that it was
in are read, but not tokenized. What comes out is the same, byte for byte, as by one process without a break.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from loqt_scale.data.cache import PLACE, InterruptedBuildError, say_on_stderr
from loqt_scale.data.corpora import LocalText
from loqt_scale.data.packing import Tokens, join_documents
from loqt_scale.data.reading_bar import reading_bar
from loqt_scale.data.token_files import TokenFile, Written
from loqt_scale.data.tokenizers import Tokenizer
from loqt_scale.process.environment import tell_tokenizers

SIDES = ("train", "eval")

_GROUP_CHARS = 1_000_000  # text tokenized at once: enough to amortise calls, little enough to stay small in memory
_ALONE_BYTES = 32_000_000  # a smaller text is tokenized sooner than other processes have started
_MOST_PROCESSES = 64  # one process reads 60 to 170 MB/s, and another one tokenizes about 1.3
_SAVE_SECONDS = 10.0
_SKIPPED_AT_ONCE = 10_000  # documents

Encoded = dict[str, tuple[Tokens, int]]
"""By side: tokens, and of how many documents."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Before which document of a text a build stands.

    Args:
        part: Number of the part that it lies in.
        documents: Documents of this part that lie before it.
        read: Bytes that lie before it, roughly.
    """

    part: int = 0
    documents: int = 0
    read: int = 0


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Tokenizes documents, each on its side; sent to the other processes.

    Args:
        tokenizer: Gives the ids and the token after each document.
        threshold: A document whose `document_hash` is below it is held out.
    """

    tokenizer: Tokenizer
    threshold: int

    @property
    def dtype(self) -> np.dtype[np.integer]:
        """Of the tokens."""
        return np.dtype("<u2" if self.tokenizer.vocab_size <= 2**16 else "<u4")

    def encode(self, documents: list[str]) -> Encoded:
        """Tokenizes some documents."""
        sides = ["eval" if document_hash(document) < self.threshold else "train" for document in documents]
        ids = self.tokenizer.encode_batch(documents)
        return {
            side: self._joined([of for of, where in zip(ids, sides, strict=True) if where == side]) for side in SIDES
        }

    def _joined(self, documents: list[list[int]]) -> tuple[Tokens, int]:
        return join_documents(documents, self.tokenizer.eos_token_id).astype(self.dtype), len(documents)


def document_hash(document: str) -> int:
    """Return a 64-bit hash of a document that is the same in every process and on every machine."""
    digest = hashlib.blake2b(document.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def write_tokens(folder: Path, text: LocalText, encoder: Encoder) -> dict[str, Written]:
    """Writes train.npy and eval.npy, or goes on with them.

    Args:
        folder: Empty, or as an interrupted call for the same text has left it.
        text: The corpus.
        encoder: Tokenizes and parts it.

    Returns:
        What has been written, by side.

    Raises:
        ValueError: What the text's documents raise.
        InterruptedBuildError: A process has ended, or the files are not what was written; `folder` is kept.
    """
    start, files = _opened(folder, text, encoder.dtype)
    saved = time.monotonic()
    try:
        with reading_bar(f"tokenizing {text.name}", text.size, start.read) as show:
            for encoded, place in _in_order(_groups(text, start), encoder, processes_for(text.size - start.read)):
                for side, file in files.items():
                    file.append(*encoded[side])
                show(place.read)
                if time.monotonic() - saved > _SAVE_SECONDS:
                    _save(folder, place, files)
                    saved = time.monotonic()
        _save(folder, Place(part=len(text.parts), read=text.size), files)
        _finish(folder, files)
        return {side: file.written for side, file in files.items()}
    finally:
        for file in files.values():
            file.close()


def processes_for(size: int) -> int:
    """How many processes tokenize so many bytes: one for each core that this one may use, or this one alone."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    alone = size < _ALONE_BYTES or multiprocessing.current_process().daemon  # which may have no children
    return 1 if alone else min(cores, _MOST_PROCESSES)


# ---- places ----------------------------------------------------------------------------------------------------------


def _opened(folder: Path, text: LocalText, dtype: np.dtype[np.integer]) -> tuple[Place, dict[str, TokenFile]]:
    """Where to begin, and the files of the sides."""
    path = folder / PLACE
    if path.exists():
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            place, known = Place(**facts["place"]), {side: Written(**facts[side]) for side in SIDES}
            files = {side: TokenFile(folder / f"{side}.npy", dtype, known[side]) for side in SIDES}
            say_on_stderr(f"tokenizing {text.name} goes on after {place.read / 1e9:.3f} of {text.size / 1e9:.3f} GB")
            return place, files
        except (OSError, ValueError, LookupError, TypeError) as error:
            say_on_stderr(f"WARNING: tokenizing {text.name} begins anew: what was left of it is damaged ({error})")
    return Place(), {side: TokenFile(folder / f"{side}.npy", dtype) for side in SIDES}


def _save(folder: Path, place: Place, files: dict[str, TokenFile]) -> None:
    for file in files.values():
        file.sync()
    facts = {"place": asdict(place)} | {side: asdict(file.written) for side, file in files.items()}
    fresh = folder / f"{PLACE}.new"
    fresh.write_text(json.dumps(facts), encoding="utf-8")
    fresh.replace(folder / PLACE)


def _finish(folder: Path, files: dict[str, TokenFile]) -> None:
    try:
        for file in files.values():
            file.finish()
    except ValueError as error:
        (folder / PLACE).unlink()
        raise InterruptedBuildError(f"{error}: another machine has, too; start it again, on one machine") from error


def _groups(text: LocalText, start: Place) -> Iterator[tuple[list[str], Place]]:
    """Documents from a place on, and the place after them; now and then none, where many are skipped."""
    group: list[str] = []
    size, before = 0, sum(part.size for part in text.parts[: start.part])
    for index, part in enumerate(text.parts[start.part :], start.part):
        skipped = start.documents if index == start.part else 0
        for number, document in enumerate(part.documents(), 1):
            if number > skipped:
                group.append(document)
                size += len(document)
            if size >= _GROUP_CHARS:
                yield group, Place(part=index, documents=number, read=before + part.read)
                group, size = [], 0
            elif number <= skipped and number % _SKIPPED_AT_ONCE == 0:
                yield [], start
        before += part.size
    yield group, Place(part=len(text.parts), read=before)


# ---- processes -------------------------------------------------------------------------------------------------------


def _in_order(
    groups: Iterable[tuple[list[str], Place]], encoder: Encoder, processes: int
) -> Iterator[tuple[Encoded, Place]]:
    """Tokenizes groups, and keeps their order."""
    if processes == 1:
        yield from ((encoder.encode(documents), place) for documents, place in groups)
        return
    waiting: deque[tuple[Future[Encoded], Place]] = deque()
    with _pool(encoder, processes) as pool:
        for documents, place in groups:
            with _without_main():
                waiting.append((pool.submit(_encode, documents), place))
            while len(waiting) > 2 * processes:
                yield _taken(waiting)
        while waiting:
            yield _taken(waiting)


def _taken(waiting: deque[tuple[Future[Encoded], Place]]) -> tuple[Encoded, Place]:
    future, place = waiting.popleft()
    return future.result(), place


@contextmanager
def _pool(encoder: Encoder, processes: int) -> Iterator[ProcessPoolExecutor]:
    # Not forked: threads of this process may hold locks, and CUDA may be at work.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=_begin, initargs=(encoder,))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise InterruptedBuildError(
            f"one of {processes} processes that tokenize has ended by itself (was there too little memory?); start the "
            "run again: it goes on where it was (fewer processes: taskset -c 0-3 COMMAND)"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _without_main() -> Iterator[None]:
    """Processes that start in here do not import the user's script, which may have no `__name__ == "__main__"`."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


_encoder: Encoder  # of another process


def _begin(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    tell_tokenizers()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # it may have been killed
    os._exit(1)


def _encode(documents: list[str]) -> Encoded:
    return _encoder.encode(documents)
