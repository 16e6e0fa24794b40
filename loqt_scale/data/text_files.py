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
from functools import partial
from pathlib import Path
from typing import IO, Any

from loqt_scale.errors import UserError, explained, reason_of, shortened
from loqt_scale.process.caller import warn_caller

KINDS = (".txt", ".jsonl", ".json", ".parquet")
_PARQUET_ROWS = 1000  # by default a batch is a row group, which can be large, and which an empty file does not have
_JSON_START_BYTES = 2**16
_LINES_A_LOOK = 20  # after so many the place in the file is noted
_WHITE = b" \t\r\n"


_LONGEST_BLOCK = 100_000_000  # characters of a .txt file without a blank line that may be one document


def unzstd(file: IO[bytes]) -> Any:
    """Reads a zstd file, of several frames all."""
    import pyarrow  # heavy: only who has such a file waits for it

    return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"))


_OPEN: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": unzstd,
}


def kind_of(path: Path) -> str | None:
    """Which of `KINDS` a file is by its name, compressed or not; None: none of them."""
    compressed = path.suffix.lower() in _OPEN
    kind = (path.with_suffix("") if compressed else path).suffix.lower()
    return kind if kind in KINDS and not (compressed and kind == ".parquet") else None


class TextFile:
    """One file, of which one pass is made at a time, streaming.

    Args:
        path: A file of one of `KINDS`.
        text_field: Column of rows that holds the text.

    Attributes:
        size: Bytes of the file, as it lies on the disk.
        read: Bytes of it that the last pass has read.
    """

    def __init__(self, path: Path, text_field: str) -> None:
        self._path, self._text_field = path, text_field
        self.size, self.read = path.stat().st_size, 0

    def documents(self) -> Iterator[str]:
        """Begins a new pass.

        Yields:
            The documents, none of them empty.

        Raises:
            ValueError: The file cannot be read, is not what its name says, is not UTF-8, or has no such column.
        """
        kind = kind_of(self._path)
        if kind == ".txt":
            return self._paragraph_blocks()
        rows = self._parquet_rows() if kind == ".parquet" else self._json_rows()
        return row_texts(rows, self._text_field, str(self._path))

    def _lines(self, most: int = -1) -> Iterator[str]:
        """Lines of text with their ends, or pieces of `most` characters; a byte order mark is no part of the first."""
        path = self._path
        try:
            with path.open("rb") as raw, _uncompressed(raw, path) as file:
                text = io.TextIOWrapper(file, encoding="utf-8-sig")
                for number, line in enumerate(iter(partial(text.readline, most), "")):
                    if number % _LINES_A_LOOK == 0:
                        self.read = raw.tell()
                    yield line
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error}); convert it, or leave it out of data.files") from error
        except (
            OSError,
            EOFError,
            zlib.error,
            lzma.LZMAError,
            ValueError,
        ) as error:  # a disk that fails, an archive that is cut off
            reason = reason_of(error)
            again = "compress it again without --long (zstd -dc --long=31 FILE | zstd > NEW)"
            advice = again if "too much memory for decoding" in reason else "mend it"
            raise UserError(
                f"{path} cannot be read to its end: {reason}; {advice}, or leave it out of data.files"
            ) from error

    def _paragraph_blocks(self) -> Iterator[str]:
        # Not load_dataset("text", sample_by="paragraph"): it parts documents at "\n\n" only, and so glues together
        # those parted by a line that holds spaces.
        block: list[str] = []
        size = 0
        for line in self._lines(_LONGEST_BLOCK + 1):
            if line.strip():
                block.append(line)
                size += len(line)
                self._check_block(size)
            elif block:
                yield "".join(block)
                block, size = [], 0
        if block:
            yield "".join(block)

    def _check_block(self, size: int) -> None:
        if size > _LONGEST_BLOCK:
            raise UserError(
                f"{self._path} has {size:,} characters without a blank line, which parts documents in .txt files; put "
                "blank lines between them, or write one JSON object a line (.jsonl)"
            )

    def _json_rows(self) -> Iterator[dict[str, Any]]:
        """Rows of JSON lines, or of a list; the first as it is, of the others the text column.

        One without it has None there; how many there were is said at the end.

        Not load_dataset("json"): it takes the types of all columns from the beginning of a file, and ends where another
        column appears, or one that nobody reads holds something else.
        """
        field, number, missing = self._text_field, 0, 0
        for number, row in enumerate(self._listed() if _is_a_list(self._path) else self._parsed_lines(), start=1):
            missing += field not in row
            yield row if number == 1 else {field: row.get(field)}
        if missing:
            warn_caller(
                f"{self._path}: {missing:,} of {number:,} rows have no column {field!r} (data.text_field) and are left "
                "out",
            )

    def _parsed_lines(self) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(self._lines(), start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(_no_json(self._path, f"line {number}: {error}")) from error
                yield _object(row, self._path, f"line {number}")

    def _listed(self) -> Iterator[dict[str, Any]]:
        """A file that is one JSON list, held in memory whole, as its form demands."""
        text = "".join(self._lines())
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(_no_json(self._path, str(error))) from error
        return (_object(row, self._path, f"item {number}") for number, row in enumerate(rows, start=1))

    def _parquet_rows(self) -> Iterator[dict[str, Any]]:
        if self.size == 0:
            return  # pyarrow would call an empty file malformed; here it is a file without documents
        # Imported here: it takes seconds, which the embedded corpus need not pay.
        import pyarrow.parquet

        problem, advice = f"{self._path} cannot be read as parquet", "mend it, or leave it out of data.files"
        with explained(problem, advice), pyarrow.parquet.ParquetFile(self._path) as file:
            names, rows = file.schema_arrow.names, 0
            if self._text_field not in names:
                yield dict.fromkeys(names)
            for batch in file.iter_batches(_PARQUET_ROWS, columns=[self._text_field]):
                yield from batch.to_pylist()
                rows += len(batch)
                self.read = self.size * rows // max(file.metadata.num_rows, 1)


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
            others = ", ".join(str(name) for name in row if name != text_field)  # only the first row has them
            raise UserError(
                f"column {text_field!r} of {source} holds {type(text).__name__} ({shortened(repr(text), 40)}), not "
                f"text; {f'write data.text_field: one of {others}' if others else 'mend that row, or leave it out'}"
            )
        if text.strip():
            yield text.encode("utf-8", "replace").decode()  # half of a surrogate pair, which JSON can spell


def _uncompressed(file: IO[bytes], path: Path) -> IO[bytes]:
    opener = _OPEN.get(path.suffix.lower())
    return file if opener is None else opener(file)


def _is_a_list(path: Path) -> bool:
    problem, advice = f"{path} cannot be read", "mend it, or leave it out of data.files"
    with explained(problem, advice), path.open("rb") as raw, _uncompressed(raw, path) as file:
        return file.read(_JSON_START_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip(_WHITE).startswith(b"[")


def _object(row: Any, path: Path, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(_no_json(path, f"{where} holds {type(row).__name__}, not an object"))
    return row


def _no_json(path: Path, reason: str) -> str:
    return f"{path} cannot be read as json: {reason}; write one JSON object a line, or leave it out of data.files"
