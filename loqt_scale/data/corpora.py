"""Where local text comes from: the embedded corpus, or files named by `data.files`.

Both are a `LocalText`: a name, a key that changes whenever the text does (`token_store.py` keys its cache by it), and
a function that starts a fresh pass over the documents. Several passes are made (one to choose the held-out documents,
one to train a BPE tokenizer, one to tokenize), each streaming, so that the text of files never has to fit in memory.

The *embedded* corpus is what every CPython carries with it: the language reference in `pydoc_data.topics`, then the
standard library's own sources. It needs no download, it is several megabytes of real English and code, and it is in the
same order on every machine with the same Python. Data sets that are streamed over a network are in `hub.py`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from loqt_scale.config.paths import expand_path
from loqt_scale.errors import MissingFileError, UserError, explained, reason_of

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
_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# By default a batch is a row group, which can be large, and which an empty file does not have.
_LOADER_OPTIONS: dict[str, dict[str, Any]] = {"json": {}, "parquet": {"batch_size": 1000}}


@dataclass(frozen=True, kw_only=True)
class LocalText:
    """Text that can be read again and again.

    Args:
        name: For people, e.g. "3 files (first: a.txt)".
        key: Changes whenever the documents do.
        documents: Starts a new pass over the documents: non-empty strings, the same ones in the same order each time.
    """

    name: str
    key: str
    documents: Callable[[], Iterator[str]]


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
        documents=lambda: iter(documents),
    )


def files_text(patterns: Iterable[str], text_field: str) -> LocalText:
    """Return the text of local files.

    Args:
        patterns: Paths or globs (`**` crosses folders) of .txt (one document per block of lines; blank lines part
            them), .jsonl/.json (one JSON object a line) and .parquet files. Read in the order given, a glob's files
            by name.
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
    return LocalText(name=name, key=f"files-{digest}", documents=lambda: _read_files(paths, text_field))


def row_texts(rows: Iterable[dict[str, Any]], text_field: str, source: str) -> Iterator[str]:
    """Take the text column out of rows, leaving out empty ones.

    Args:
        rows: Rows as the `datasets` library yields them.
        text_field: The column.
        source: Named in errors.

    Raises:
        ValueError: A row lacks the column, or holds something other than a string there.
    """
    for row in rows:
        if text_field not in row:
            raise UserError(
                f"{source} has no column {text_field!r}; write data.text_field: one of {', '.join(map(str, row))}"
            )
        text = row[text_field]
        if text is None:
            continue
        if not isinstance(text, str):
            raise UserError(
                f"column {text_field!r} of {source} holds {type(text).__name__}, not text; "
                f"write data.text_field: one of {', '.join(map(str, row))}"
            )
        if text.strip():
            yield text


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
        path = Path(expand_path(pattern, "data.files"))
        if path.is_file():
            matches = [path]
        elif path.is_dir():
            raise UserError(f"data.files names the folder {pattern}; write {pattern}/*.jsonl (or .txt, .parquet)")
        elif glob.has_magic(pattern):
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
            if not matches:
                raise MissingFileError(
                    f"no file matches {pattern}; write a path or glob of existing files in data.files"
                )
        else:
            raise MissingFileError(f"{pattern} does not exist; write a path or glob of existing files in data.files")
        for match in matches:
            if match.suffix.lower() not in {".txt", *_LOADERS}:
                raise UserError(
                    f"{match} is not a kind of file that can be read; write .txt, .jsonl, .json or .parquet files in "
                    "data.files"
                )
            _check_readable(match)
            found[match.resolve()] = None
    if not found:
        raise UserError("data.files is empty; write paths or globs of .txt, .jsonl, .json or .parquet files")
    return list(found)


def _check_readable(path: Path) -> None:
    advice = "mend its permissions, or leave it out of data.files"
    with explained(f"{path} cannot be read", advice, of=(OSError,)), path.open("rb"):
        pass
    if "::" in str(path) and path.suffix.lower() in _LOADERS:
        raise UserError(f"{path} has '::' in its name, which the datasets library takes for two paths; rename it")


def _read_files(paths: list[Path], text_field: str) -> Iterator[str]:
    for path in paths:
        if path.suffix.lower() == ".txt":
            yield from _paragraph_blocks(path)
        else:
            yield from row_texts(_rows(path), text_field, str(path))


def _paragraph_blocks(path: Path) -> Iterator[str]:
    # Not load_dataset("text", sample_by="paragraph"): it parts documents at "\n\n" only, and so glues together those
    # parted by a line that holds spaces.
    block: list[str] = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for line in lines:
                if line.strip():
                    block.append(line)
                elif block:
                    yield "".join(block)
                    block = []
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); convert it, or leave it out of data.files") from error
    except OSError as error:  # a disk that fails, a mount that is gone
        raise UserError(f"{path} cannot be read to its end: {reason_of(error)}") from error
    if block:
        yield "".join(block)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.stat().st_size == 0:
        return  # pyarrow would call an empty file malformed; here it is a file without documents
    # Imported here: it takes seconds, which the embedded corpus need not pay.
    import datasets

    loader = _LOADERS[path.suffix.lower()]
    # The library expands globs again, so characters that are special in one have to be escaped.
    data_files = glob.escape(str(path))
    # pyarrow, json and datasets each raise their own
    with explained(f"{path} cannot be read as {loader}", "mend it, or leave it out of data.files"):
        yield from datasets.load_dataset(
            loader, data_files=data_files, split="train", streaming=True, **_LOADER_OPTIONS[loader]
        )
