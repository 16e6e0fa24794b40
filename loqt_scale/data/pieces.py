"""Which documents a logical stream of a streamed data set reads, in which order.

A data set lies in n files. Where these are fewer than the K streams, each is cut into as many parts as are needed:
parquet files by row groups, if they have enough; others by every k-th row, so that a file is read by several streams,
each of which tokenizes its own rows alone. A file, or a part of one, is a *piece*.

    all pieces, in an order drawn from (seed, epoch), epoch after epoch      p0 p1 p2 ...        one endless list
    stream k reads                                                           p_k  p_{k+K}  p_{k+2K} ...

So no stream ends before another. One that is through with its files goes on with those of the next epoch, and every
file has been read once before any is read for the third time.

Inside a piece rows are shuffled block by block. A block can be read again, so a place in it is two numbers; what lies
in a shuffle buffer would have to be kept, or read again from the beginning.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice

import numpy as np

from loqt_scale.data.batches import epoch_order
from loqt_scale.data.hub import Split
from loqt_scale.data.packing import Int64Array, cut_windows, join_documents, text_groups
from loqt_scale.data.streaming import Chunk, Place
from loqt_scale.data.tokenizers import Tokenizer
from loqt_scale.errors import UserError
from loqt_scale.functional.seeding import stable_seed

SHUFFLED_ROWS = 10_000
"""Rows that all logical streams together hold while they shuffle them."""

_ENCODE_CHARS = 50_000  # text tokenized at once; small, because the first batch waits for it
_ENCODING = threading.Lock()  # a tokenizer is not made for several threads; it takes all cores by itself


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """The pieces of a split.

    Args:
        split: From `hub.open_splits`.
        streams: K.
        seed: Seed of the order.
        files: Into how many the split can be divided without reading anything twice.
    """

    split: Split
    streams: int
    seed: int
    files: int

    @property
    def parts(self) -> int:
        """Pieces of each file."""
        return -(-self.streams // self.files)

    @property
    def count(self) -> int:
        """All of them."""
        return self.files * self.parts

    @property
    def origin(self) -> str:
        """What a place belongs to."""
        return f"{self.files} file{'' if self.files == 1 else 's'}"

    @property
    def description(self) -> str:
        """For people."""
        if self.parts == 1:
            return self.origin
        return f"{self.origin}, each read by {self.parts} streams (write more files, and each is read once)"

    def texts(self, place: int, row: int) -> Iterator[tuple[int, list[str]]]:
        """The piece at a place of the endless list, from a row on (of the piece's own), in shuffled blocks.

        Yields:
            The first row of a block, and its documents.
        """
        epoch, index = divmod(place, self.count)
        part, file = divmod(int(epoch_order(self.count, self.seed, epoch)[index]), self.files)
        rows = islice(self.split.rows.shard(self.files, file), part + row * self.parts, None, self.parts)
        size = -(-SHUFFLED_ROWS // self.streams)
        with self.split.explained():
            while block := list(islice(rows, size)):
                texts = list(self.split.texts(block))
                order = epoch_order(len(texts), stable_seed("block", self.seed, place, row), 0)
                yield row, [texts[i] for i in order]
                row += len(block)


def cut_into_pieces(split: Split, *, streams: Callable[[int], int], seed: int) -> Pieces:
    """Cuts a split so that there is a piece for each logical stream.

    Args:
        split: From `hub.open_splits`.
        streams: K for a number of files.
        seed: Seed of the order.
    """
    files = int(split.rows.num_shards)
    wanted = streams(files)
    if files < wanted and hasattr(split.rows, "reshard"):  # of newer datasets: row groups become files of their own
        split = replace(split, rows=split.rows.reshard())
    return Pieces(split=split, streams=wanted, seed=seed, files=int(split.rows.num_shards))


def training_windows(pieces: Pieces, stream: int, tokenizer: Tokenizer, seq_len: int, start: Place) -> Iterator[Chunk]:
    """Tokenizes and packs a logical stream for ever. Pieces are laid end to end, like documents.

    Args:
        pieces: All of them.
        stream: Which one, below K.
        tokenizer: Gives the ids and the token after each document.
        seq_len: T.
        start: Where to begin; what lies before it in its piece is read, but not tokenized.

    Yields:
        (m, T + 1) int64, m >= 1, and the place that they begin at.

    Raises:
        ValueError: A row has no text column, the whole data set is shorter than one sequence, or no stream of this
            tokenizer and T was ever at `start`.
    """
    if len(start.rest) > seq_len or max(start.rest, default=0) >= tokenizer.vocab_size:
        raise UserError(f"{len(start.rest)} tokens up to {max(start.rest)} do not wait in this stream")
    rest, seen = np.asarray(start.rest, dtype=np.int64), 0
    for place, texts in _blocks(pieces, stream, start):
        if place.piece == pieces.count and seen <= seq_len and start == Place():
            _check_size(pieces.split, tokenizer, seq_len)
        for group in text_groups(texts, _ENCODE_CHARS):
            begin = replace(place, rest=tuple(rest.tolist()))
            chunk = _encoded(group, tokenizer)
            place, seen = replace(place, texts=place.texts + len(group)), seen + len(chunk)
            windows, left = cut_windows(np.concatenate([rest, chunk]), seq_len)
            rest = left.copy()  # not a view, which would hold the whole chunk
            if len(windows):
                yield windows, begin


def _blocks(pieces: Pieces, stream: int, start: Place) -> Iterator[tuple[Place, list[str]]]:
    """A stream's documents from a place on: those of a block from a place in it on, none at the end of a piece."""
    for index in count(start.piece):
        at = start if index == start.piece else Place(piece=index)
        found = pieces.texts(stream + index * pieces.streams, at.row)
        if at.row or at.texts:
            row, texts = next(found, (at.row, []))
            if at.texts >= len(texts):
                raise UserError(
                    f"{pieces.split.source} ends before row {at.row} of one of its files; put the old one back"
                )
            yield replace(at, rest=(), windows=0), texts[at.texts :]
        for row, texts in found:
            yield Place(piece=index, row=row), texts
        yield Place(piece=index + 1), []


def _encoded(texts: list[str], tokenizer: Tokenizer) -> Int64Array:
    with _ENCODING:
        return join_documents(tokenizer.encode_batch(texts), tokenizer.eos_token_id)


def _check_size(split: Split, tokenizer: Tokenizer, seq_len: int) -> None:
    """Refuses a data set that is shorter than one sequence; one that is not is read no further than that."""
    tokens = 0
    for group in text_groups(split.texts(split.rows), _ENCODE_CHARS):
        tokens += len(_encoded(group, tokenizer))
        if tokens > seq_len:
            return
    raise UserError(
        f"corpus smaller than one sequence: {split.source} has {tokens} tokens, and data.seq_len {seq_len} needs "
        f"{seq_len + 1}; write a smaller data.seq_len"
    )
