"""Which file holds which rows of a tensor, and those rows.

A file's own header says what it holds, so the header is checked against the manifest: each tensor has the shape and the
dtype that the manifest gives, and its rows are there once each, all of them. Nothing is allocated before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby, pairwise
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loqt_scale.checkpoint.files import ListedFiles
from loqt_scale.checkpoint.manifest import Count, Manifest

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "U8": "uint8", "I8": "int8"}  # safetensors' names
Rows = tuple[int, int]

# where torch.distributed.checkpoint says at which row of the whole tensor a file's part of it begins
_OFFSETS_KEY, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
_OFFSETS_SCHEMA = TypeAdapter(dict[str, dict[str, Annotated[list[Count], Field(max_length=8)]]])


class Piece(NamedTuple):
    """Rows [start, stop) of a tensor, in a file."""

    start: int
    stop: int
    file: str


Pieces = Mapping[str, list[Piece]]


def find_pieces(files: ListedFiles, manifest: Manifest) -> Pieces:
    """Where the rows of each tensor of a manifest lie, in order. Reads headers only.

    Raises:
        CheckpointError: A file is not what the manifest says, or no safetensors file.
    """
    pieces: dict[str, list[Piece]] = {name: [] for name in manifest.tensors}
    for file in manifest.shards:
        with _open_shard(files, file) as shard:
            for name, piece in _pieces_of(files, shard, file, manifest):
                pieces[name].append(piece)
    for name, found in pieces.items():
        found.sort()
        ends = [0, *(row for piece in found for row in piece[:2]), manifest.tensors[name][0][0]]
        if any(before != after for before, after in list(pairwise(ends))[::2]):
            raise files.error(f"its files do not hold each row of {name} once")
    return pieces


def read_rows(files: ListedFiles, manifest: Manifest, pieces: Pieces, wanted: Mapping[str, Rows]) -> dict[str, Tensor]:
    """Reads rows [start, stop) of tensors, whoever wrote them.

    Args:
        files: Verified.
        manifest: Lists the tensors.
        pieces: From `find_pieces`.
        wanted: Rows by the tensor's name.

    Returns:
        (stop - start, *rest) on the host, in the manifest's dtype.

    Raises:
        CheckpointError: A file is not the one that was verified.
    """
    result = {name: _empty(*manifest.tensors[name], rows) for name, rows in wanted.items()}
    parts = [(piece, name) for name, rows in wanted.items() for piece in pieces[name] if _common(piece, rows)]
    parts.sort(key=lambda part: part[0].file)
    for file, group in groupby(parts, key=lambda part: part[0].file):
        with _open_shard(files, file) as shard:
            for piece, name in group:
                rows, begin = _common(piece, wanted[name]), wanted[name][0]
                stored = shard.get_slice(name)[rows.start - piece.start : rows.stop - piece.start]
                result[name][rows.start - begin : rows.stop - begin] = stored
    return result


def _common(piece: Piece, rows: Rows) -> range:
    return range(max(piece.start, rows[0]), min(piece.stop, rows[1]))


def _empty(shape: tuple[int, ...], dtype: str, rows: Rows) -> Tensor:
    return torch.empty((rows[1] - rows[0], *shape[1:]), dtype=getattr(torch, dtype))


@contextmanager
def _open_shard(files: ListedFiles, name: str) -> Iterator[Any]:
    """The open file itself is read, not whatever has its name by then."""
    try:
        with files.open(name) as file, safe_open(f"/dev/fd/{file.fileno()}", framework="pt") as shard:
            yield shard
    except SafetensorError as error:
        raise files.error(f"{name} is no safetensors file ({ascii(str(error))[1:-1]})") from None


def _pieces_of(files: ListedFiles, shard: Any, file: str, manifest: Manifest) -> Iterator[tuple[str, Piece]]:
    offsets = _offsets(files, shard, file)
    for name in shard.keys():  # noqa: SIM118 (not a dict)
        view, known = shard.get_slice(name), manifest.tensors.get(name)
        shape, dtype = tuple(view.get_shape()), DTYPES.get(view.get_dtype())
        start, *others = offsets.get(name) or [0] * len(shape) or [0]
        if known is None or (shape[1:], len(shape), dtype) != (known[0][1:], len(known[0]), known[1]) or any(others):
            raise files.error(
                f"{file} holds {shape} {dtype} as {name!a}, of which its manifest says {known or 'nothing'}"
            )
        if shape[0]:
            yield name, Piece(start, start + shape[0], file)


def _offsets(files: ListedFiles, shard: Any, file: str) -> dict[str, list[int]]:
    """Where each of a file's tensors begins in the whole one; nothing of those that are whole."""
    text = (shard.metadata() or {}).get(_OFFSETS_KEY, "{}")
    try:
        return {name: places[_OFFSETS] for name, places in _OFFSETS_SCHEMA.validate_json(text).items()}
    except (ValueError, KeyError):
        raise files.error(f"{file} does not say where its rows belong") from None
