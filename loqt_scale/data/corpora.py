"""Where local text comes from: the embedded corpus, or files named by `data.files`.

Both are a `LocalText`: a name, a key that changes whenever the text does (`token_store.py` keys its cache by it), and
parts, over whose documents fresh passes can be made. Several are (to train a BPE tokenizer, to tokenize), each
streaming, so that the text of files never has to fit in memory.

The *embedded* corpus is what every CPython carries with it: the language reference in `pydoc_data.topics`, then the
standard library's own sources. It needs no download, it is several megabytes of real English and code, and it is in the
same order on every machine with the same Python. Data sets that are streamed over a network are in `hub.py`.
"""

from __future__ import annotations

import glob
import hashlib
import heapq
import json
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from loqt_scale.config.paths import expand_path
from loqt_scale.data.text_files import TextFile, kind_of
from loqt_scale.errors import MissingFileError, UserError, explained

EMBEDDED_MAX_BYTES = 12_000_000
"""The embedded corpus ends with the document that passes this size."""

_MIN_SOURCE_CHARS = 200  # shorter files are empty __init__.py's and deprecation shims
_SKIPPED_FOLDERS = {
    "__phello__",
    "__pycache__",
    "dist-packages",
    "encodings",  # a hundred nearly equal tables: held-out documents would have twins in the training set
    "ensurepip",
    "idle_test",
    "idlelib",
    "lib-dynload",
    "lib2to3",
    "pydoc_data",  # read as topics
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")  # written when this Python was built: differ from machine to machine


class Part(Protocol):
    """A part of a text, which can be read apart from the others; see `text_files.TextFile`."""

    @property
    def size(self) -> int:
        """Bytes, as they lie on the disk."""

    @property
    def read(self) -> int:
        """Bytes that the last pass has read."""

    def documents(self) -> Iterator[str]:
        """Begins a new pass over the documents: non-empty strings, the same ones in the same order each time."""


@dataclass(frozen=True, kw_only=True)
class LocalText:
    """Text that can be read again and again.

    Args:
        name: For people, e.g. "3 files (first: a.txt)".
        key: Changes whenever the documents do.
        parts: In order; one pass at a time is made over each.
    """

    name: str
    key: str
    parts: Sequence[Part]

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)

    def documents(self) -> Iterator[str]:
        """Begins a new pass over the documents of all parts."""
        for part in self.parts:
            yield from part.documents()


@dataclass
class HeldInMemory:
    """A `Part` that is a list of documents."""

    texts: Sequence[str]
    read: int = 0

    @property
    def size(self) -> int:
        return sum(map(len, self.texts))

    def documents(self) -> Iterator[str]:
        self.read = 0
        for text in self.texts:
            self.read += len(text)
            yield text


def embedded_text() -> LocalText:
    """Return the corpus that comes with Python (see the module's docstring).

    Raises:
        ValueError: This Python was installed without its library sources.
    """
    documents = list(_embedded_documents())
    if not documents:
        raise UserError(
            "this Python came without pydoc_data and library sources, so there is no embedded corpus; "
            "write data.files: [FILE.txt] or data.dataset: ID"
        )
    content = hashlib.blake2b(digest_size=16)
    for document in documents:
        content.update(document.encode("utf-8", "surrogatepass") + b"\0")
    return LocalText(
        name=f"embedded corpus (documentation and library sources of Python {platform.python_version()})",
        key=f"embedded-{platform.python_version()}-{content.hexdigest()}",
        parts=[HeldInMemory(documents)],
    )


def files_text(patterns: Iterable[str], text_field: str) -> LocalText:
    """Return the text of local files.

    Args:
        patterns: Paths, folders or globs (`**` crosses folders) of .txt (one document per block of lines; blank lines
            part them), .jsonl/.json (one JSON object a line) and .parquet files; all but the last also compressed
            (.gz, .bz2, .xz, .zst). Read in the order given, the files of a glob or a folder by name.
        text_field: Column of JSON and parquet rows that holds the text.

    Raises:
        FileNotFoundError: A path does not exist, or a glob matches nothing.
        ValueError: An extension is not one of those above. While reading: a column is missing or holds no text, or a
            .txt file is not UTF-8.
    """
    paths = _expand(patterns)
    # Another inode or time of change (which nobody can set) is another file, even of the same size and age.
    facts: list[Any] = [text_field]
    for path in paths:
        stat = path.stat()
        facts.append([str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
    name = str(paths[0]) if len(paths) == 1 else f"{len(paths)} files (first: {paths[0]})"
    return LocalText(name=name, key=f"files-{digest}", parts=[TextFile(path, text_field) for path in paths])


@dataclass(frozen=True)
class _ByTurns:
    """A part with the documents of several texts: the next is of the text that has had the fewest characters."""

    texts: Sequence[LocalText]
    read: int = 0

    @property
    def size(self) -> int:
        return sum(text.size for text in self.texts)

    def documents(self) -> Iterator[str]:
        waiting = [(0, place, text.documents()) for place, text in enumerate(self.texts)]
        while waiting:
            taken, place, documents = waiting[0]
            document = next(documents, None)
            if document is None:
                heapq.heappop(waiting)
                continue
            yield document
            heapq.heapreplace(waiting, (taken + len(document), place, documents))


def joined_text(texts: Sequence[LocalText]) -> LocalText:
    """Several texts as one, which has as many characters of each, wherever it is left off, until one is through."""
    if len(texts) == 1:
        return texts[0]
    return LocalText(
        name=f"{len(texts)} texts (first: {texts[0].name})",
        key=json.dumps(["by turns", *(text.key for text in texts)]),
        parts=[_ByTurns(texts)],
    )


def _embedded_documents() -> Iterator[str]:
    size = 0
    for document in _topics_then_sources():
        yield document
        size += len(document.encode("utf-8", "surrogatepass"))
        if size >= EMBEDDED_MAX_BYTES:
            return


def _topics_then_sources() -> Iterator[str]:
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError:  # some Linux distributions package it apart
        topics = {}
    yield from (topics[name] for name in sorted(topics) if topics[name].strip())
    # Not Path.rglob: it would walk through site-packages, which can be large, only to skip it.
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = sorted(name for name in subfolders if not _skipped(name))
        for name in sorted(names):
            if name.endswith(".py") and not _skipped(name):
                text = Path(folder, name).read_text(encoding="utf-8", errors="replace")
                if len(text) >= _MIN_SOURCE_CHARS:
                    yield text


def _skipped(name: str) -> bool:
    return name in _SKIPPED_FOLDERS or name.startswith(_SKIPPED_PREFIXES)


def _expand(patterns: Iterable[str]) -> list[Path]:
    found: dict[Path, None] = {}  # a file that two patterns match is read once
    for pattern in patterns:
        for match in _matches(pattern):
            if kind_of(match) is None:
                raise UserError(
                    f"{match} is not a kind of file that can be read; write .txt, .jsonl, .json or .parquet files in "
                    "data.files (all but the last may be compressed: .gz, .bz2, .xz, .zst)"
                )
            _check_readable(match)
            found[match.resolve()] = None
    if not found:
        raise UserError("data.files is empty; write paths or globs of .txt, .jsonl, .json or .parquet files")
    return list(found)


def _matches(pattern: str) -> list[Path]:
    path = Path(expand_path(pattern, "data.files"))
    if path.is_file():
        return [path]
    if path.is_dir():
        found = (file for file in path.rglob("*") if not any(p.startswith(".") for p in file.relative_to(path).parts))
        below = sorted(file for file in found if kind_of(file) is not None and file.is_file())
        if not below:
            raise UserError(
                f"data.files names the folder {pattern}, which holds no .txt, .jsonl, .json or .parquet file; write "
                "another one"
            )
        return below
    if not glob.has_magic(pattern):
        raise MissingFileError(f"{pattern} does not exist; write a path or glob of existing files in data.files")
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
    if not matches:
        raise MissingFileError(f"no file matches {pattern}; write a path or glob of existing files in data.files")
    return matches


def _check_readable(path: Path) -> None:
    advice = "mend its permissions, or leave it out of data.files"
    with explained(f"{path} cannot be read", advice, of=(OSError,)), path.open("rb"):
        pass
    if "::" in str(path) and kind_of(path) == ".parquet":
        raise UserError(f"{path} has '::' in its name, which the datasets library takes for two paths; rename it")
