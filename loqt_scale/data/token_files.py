"""Files of tokens that grow: what has been written to them is known, so that another process can go on with them."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loqt_scale.data.packing import Tokens

_BLOCK_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class Written:
    """What has been written to a file.

    Args:
        documents: Number of documents.
        tokens: Number of tokens.
        crc: CRC-32 of the tokens' bytes.
    """

    documents: int = 0
    tokens: int = 0
    crc: int = 0


class TokenFile:
    """A one-dimensional .npy file whose length is known only at the end.

    Args:
        path: The file; made if it is not there.
        dtype: Of the tokens.
        written: What is kept of it; the rest is cut off.

    Raises:
        ValueError: The file does not hold what was `written`.
    """

    def __init__(self, path: Path, dtype: np.dtype[np.integer], written: Written | None = None) -> None:
        self.written = written or Written()
        self._dtype, self._path, self._went_on = dtype, path, written is not None
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._write_header(0)
        self._header_size = self._file.tell()
        self._check()
        self._file.truncate()

    def append(self, tokens: Tokens, documents: int) -> None:
        """Writes the tokens of some documents."""
        content, old = tokens.astype(self._dtype).tobytes(), self.written
        self._file.write(content)
        self.written = Written(
            documents=old.documents + documents,
            tokens=old.tokens + len(tokens),
            crc=zlib.crc32(content, old.crc),
        )

    def sync(self) -> None:
        """Waits until all is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Writes the length and closes the file.

        Raises:
            ValueError: Somebody else has written to it, too.
        """
        self._write_header(self.written.tokens)
        # numpy pads the header so that the length can grow in place; data would be overwritten if it ever did not.
        assert self._file.tell() == self._header_size
        if self._went_on:
            self._check()
        self.close()

    def close(self) -> None:
        """Closes the file as it is."""
        self._file.close()

    def _write_header(self, count: int) -> None:
        self._file.seek(0)
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def _check(self) -> None:
        """Reads from behind the header on what has been written, and stays there."""
        self._file.seek(self._header_size)
        left, crc = self.written.tokens * self._dtype.itemsize, 0
        while left and (block := self._file.read(min(left, _BLOCK_BYTES))):
            left, crc = left - len(block), zlib.crc32(block, crc)
        if left or crc != self.written.crc:
            raise ValueError(f"{self._path} does not hold the {self.written.tokens} tokens that were written to it")
