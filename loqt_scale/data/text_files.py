"""The documents of one local file: text, JSON lines or parquet, and what compresses them.

Of rows only the text column is read. What else a row holds may change its type, or appear, in the middle of a file.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from loqt_scale.errors import UserError, explained, reason_of

KINDS = (".txt", ".jsonl", ".json", ".parquet")
_PARQUET_ROWS = 1000  # by default a batch is a row group, which can be large, and which an empty file does not have
_JSON_START_BYTES = 2**16
_WHITE = b" \t\r\n"


def _open_zstd(path: Path) -> Any:
    import pyarrow  # heavy: only who has such a file waits for it

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


_OPEN: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zstd,
}


def kind_of(path: Path) -> str | None:
    """Which of `KINDS` a file is by its name, compressed or not; None: none of them."""
    compressed = path.suffix.lower() in _OPEN
    kind = (path.with_suffix("") if compressed else path).suffix.lower()
    return kind if kind in KINDS and not (compressed and kind == ".parquet") else None


def documents_of(path: Path, text_field: str) -> Iterator[str]:
    """Reads a file, streaming.

    Args:
        path: A file of one of `KINDS`.
        text_field: Column of rows that holds the text.

    Yields:
        Its documents, none of them empty.

    Raises:
        ValueError: It cannot be read, is not what its name says, is not UTF-8, or has no such column.
    """
    kind = kind_of(path)
    if kind == ".txt":
        return _paragraph_blocks(path)
    rows = _parquet_rows(path, text_field) if kind == ".parquet" else _json_rows(path, text_field)
    return row_texts(rows, text_field, str(path))


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
            yield text.encode("utf-8", "replace").decode()  # half of a surrogate pair, which JSON can spell


def _open(path: Path) -> IO[bytes]:
    opener = _OPEN.get(path.suffix.lower())
    return path.open("rb") if opener is None else opener(path)


def _lines(path: Path) -> Iterator[str]:
    """Lines of a text file with their ends; a byte order mark is no part of the first."""
    try:
        with _open(path) as file:
            yield from io.TextIOWrapper(file, encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); convert it, or leave it out of data.files") from error
    except (
        OSError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        ValueError,
    ) as error:  # a disk that fails, an archive that is cut off
        raise UserError(f"{path} cannot be read to its end: {reason_of(error)}") from error


def _paragraph_blocks(path: Path) -> Iterator[str]:
    # Not load_dataset("text", sample_by="paragraph"): it parts documents at "\n\n" only, and so glues together those
    # parted by a line that holds spaces.
    block: list[str] = []
    for line in _lines(path):
        if line.strip():
            block.append(line)
        elif block:
            yield "".join(block)
            block = []
    if block:
        yield "".join(block)


def _json_rows(path: Path, text_field: str) -> Iterator[dict[str, Any]]:
    """Rows of JSON lines, or of a list; the first as it is, of the others the text column, None if they have none.

    Not load_dataset("json"): it takes the types of all columns from the beginning of a file, and ends where another
    column appears, or one that nobody reads holds something else.
    """
    first = True
    for row in _listed(path) if _is_a_list(path) else _parsed_lines(path):
        yield row if first else {text_field: row.get(text_field)}
        first = False


def _parsed_lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(_no_json(path, f"line {number}: {error}")) from error
            yield _object(row, path, f"line {number}")


def _listed(path: Path) -> Iterator[dict[str, Any]]:
    """A file that is one JSON list, held in memory whole, as its form demands."""
    text = "".join(_lines(path))
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(_no_json(path, str(error))) from error
    return (_object(row, path, f"item {number}") for number, row in enumerate(rows, start=1))


def _is_a_list(path: Path) -> bool:
    with explained(f"{path} cannot be read", "mend it, or leave it out of data.files"), _open(path) as file:
        return file.read(_JSON_START_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip(_WHITE).startswith(b"[")


def _object(row: Any, path: Path, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(_no_json(path, f"{where} holds {type(row).__name__}, not an object"))
    return row


def _no_json(path: Path, reason: str) -> str:
    return f"{path} cannot be read as json: {reason}; write one JSON object a line, or leave it out of data.files"


def _parquet_rows(path: Path, text_field: str) -> Iterator[dict[str, Any]]:
    if path.stat().st_size == 0:
        return  # pyarrow would call an empty file malformed; here it is a file without documents
    # Imported here: it takes seconds, which the embedded corpus need not pay.
    import pyarrow.parquet

    advice = "mend it, or leave it out of data.files"
    with explained(f"{path} cannot be read as parquet", advice), pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if text_field not in names:
            yield dict.fromkeys(names)
        for batch in file.iter_batches(_PARQUET_ROWS, columns=[text_field]):
            yield from batch.to_pylist()
