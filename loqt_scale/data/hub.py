"""Data sets that are streamed: a Hugging Face id, or a folder of one, named by `data.dataset`.

Such a data set may be larger than any disk here, so it is read row by row as training goes on. Its publisher has split
it already: `data.split` is trained on and `data.eval_split` is held out, and nothing is re-split here. Which rows come
when is in `pieces`.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from loqt_scale.config import DataConfig
from loqt_scale.data.packing import Int64Array, evaluation_windows, join_documents, text_groups
from loqt_scale.data.text_files import row_texts, unzstd
from loqt_scale.data.tokenizers import Tokenizer
from loqt_scale.errors import MissingFileError, UserError, explained, reason_of
from loqt_scale.process.caller import warn_caller

if TYPE_CHECKING:  # it takes seconds to import, which the embedded corpus need not pay
    import datasets

_ENCODE_CHARS = 200_000  # text of the held-out part tokenized at once
_CHARS, _ROWS = 2**18, 100  # read at once of a file; the library would hold 10 MB, or a row group, of each that is open


@dataclass(frozen=True, kw_only=True)
class Split:
    """A split of a streamed data set.

    Args:
        source: Which one, for people.
        rows: Its rows as they lie in its files, not shuffled. `rows.num_shards` files can be read apart.
        text_field: Column that holds the text.
        are_lines: Rows are lines of JSON in the column "text".
    """

    source: str
    rows: datasets.IterableDataset
    text_field: str
    are_lines: bool = False

    def texts(self, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
        """The documents of some of its rows; rows without text are left out.

        Raises:
            ValueError: A row has no text column, or it holds no text.
        """
        objects = _objects(rows, self.text_field, self.source) if self.are_lines else rows
        with self.explained():
            yield from row_texts(objects, self.text_field, self.source)

    def explained(self) -> AbstractContextManager[None]:
        """Where rows are read: they come over a network, through several libraries with errors of their own."""
        advice = "mend its files; or, if a network failed, start again: a run goes on from its last checkpoint"
        return explained(f"{self.source} cannot be read to its end", advice)


def open_splits(config: DataConfig) -> tuple[Split, Split]:
    """Open the training and the held-out split of `config.dataset`, and look at one row of each.

    Returns:
        The training split and the held-out split.

    Raises:
        FileNotFoundError: `config.dataset` is a folder that does not exist or holds no data.
        ValueError: The data set cannot be opened; a split does not exist, is empty, or lacks the text column; or both
            splits are one.
    """
    if config.split == config.eval_split:
        raise UserError(
            f"data.split and data.eval_split are both {config.split!r}, so training text would be scored; write "
            "another data.eval_split"
        )
    splits = _load(config)
    for key, name in (("data.split", config.split), ("data.eval_split", config.eval_split)):
        if name not in splits:
            raise UserError(
                f"{config.dataset} has no split {name!r}; write {key}: one of {', '.join(map(str, splits))}"
            )
        _check_first_row(splits[name])
    return splits[config.split], splits[config.eval_split]


def split_lines(config: DataConfig, *splits: Split) -> tuple[str, ...]:
    """What tells one copy of a data set from another before it is read through: its files and its first row."""
    assert config.dataset is not None
    lines = [f"{split.source}: first row, digest {_row_digest(split)}" for split in splits]
    folder = Path(config.dataset)
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("[!.]*") if path.is_file())
        lines += [f"{path.relative_to(folder)}: {path.stat().st_size} bytes" for path in files]
    return tuple(lines)


def _row_digest(split: Split) -> str:
    row = next(iter(split.rows), None)
    return hashlib.blake2b(repr(row).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def held_out_windows(split: Split, tokenizer: Tokenizer, config: DataConfig) -> tuple[Int64Array, Int64Array]:
    """Return the first `config.max_eval_sequences` sequences of the held-out split, in its own order.

    Returns:
        inputs and labels, each (N, T) int64, as `packing.evaluation_windows` makes them.

    Raises:
        ValueError: The split holds no text.
    """
    wanted = config.max_eval_sequences * config.seq_len + 1
    chunks: list[Int64Array] = []
    for group in text_groups(split.texts(split.rows), _ENCODE_CHARS):
        chunks.append(join_documents(tokenizer.encode_batch(group), tokenizer.eos_token_id))
        wanted -= len(chunks[-1])
        if wanted <= 0:
            break
    if not chunks:
        raise UserError(
            f"corpus is empty: {split.source} holds no text in column {config.text_field!r}; write another "
            "data.eval_split or data.text_field"
        )
    tokens = np.concatenate(chunks)[: config.max_eval_sequences * config.seq_len + 1]
    return evaluation_windows(tokens, config.seq_len, config.max_eval_sequences, tokenizer.eos_token_id)


def _load(config: DataConfig) -> dict[str, Split]:
    import datasets

    assert config.dataset is not None
    _read_zstd()
    try:
        builder = datasets.load_dataset_builder(config.dataset, config.dataset_config)
        found = dict(builder.as_streaming_dataset())
        wanted = found.keys() & {config.split, config.eval_split}
        splits = {
            str(name): Split(source=f"split {str(name)!r} of {config.dataset}", rows=rows, text_field=config.text_field)
            for name, rows in found.items()
        }
        return splits | {name: _text_only(builder, splits[name], name) for name in wanted}
    except FileNotFoundError as error:
        raise MissingFileError(
            f"{config.dataset} is not a data set ({reason_of(error)}); write a Hugging Face id or a folder of .jsonl "
            "or .parquet files in data.dataset"
        ) from error
    except Exception as error:  # no such configuration, no network, a loading script, ...
        reason = reason_of(error) if str(error) else "is one of its files empty?"  # then it is a bare StopIteration
        raise UserError(
            f"{config.dataset} cannot be opened ({reason}); write a Hugging Face id or an existing folder in "
            "data.dataset, and one of its configurations in data.dataset_config"
        ) from error


def _read_zstd() -> None:
    """Has the library read .zst files, which it leaves to a package that may not be there."""
    from fsspec.compression import compr, register_compression

    def opened(file: IO[bytes], mode: str = "rb", **given: Any) -> Any:
        return unzstd(file)

    if "zstd" not in compr:
        register_compression("zstd", opened, "zst")


def _text_only(builder: Any, split: Split, name: str) -> Split:
    """The same rows in the same order, of which no column but the text's can end a run.

    The library takes the types of all columns from the first rows, and ends where another column appears in the middle
    of a shard, or one that nobody reads holds something else. So JSON lines are read as lines and parsed here, and of
    parquet files the text column alone is read.
    """
    import datasets

    found = {str(key): list(paths) for key, paths in (builder.config.data_files or {}).items()}.get(name, [])
    files = {name: [path if "://" in path else glob.escape(path) for path in found]}  # the library takes them for globs
    if not found or builder.name not in ("json", "parquet") or _asks_for_more(builder.config):
        return split
    if builder.name == "parquet":
        if split.text_field not in (split.rows.column_names or []):
            return split
        columns = [split.text_field]
        rows = datasets.load_dataset("parquet", data_files=files, columns=columns, batch_size=_ROWS, streaming=True)
        return replace(split, rows=rows[name])
    lines = datasets.load_dataset("text", data_files=files, chunksize=_CHARS, streaming=True)[name]
    first = next((_parsed(row) for row in lines if row["text"].strip()), None)
    if not isinstance(first, dict) or split.text_field not in first:
        return split  # a list, or no JSON, or another column: the library says which
    return replace(split, rows=lines, are_lines=True)


def _asks_for_more(config: Any) -> bool:
    """Whether a data set's card has its files read in a way of their own."""
    given = (getattr(config, name, None) for name in ("field", "filters", "columns", "features"))
    return any(value is not None for value in given) or getattr(config, "encoding", "utf-8") not in ("utf-8", None)


def _parsed(row: dict[str, str]) -> Any:
    """What a line holds; None if that is no JSON."""
    try:
        return json.loads(row["text"].lstrip("\ufeff"))
    except (ValueError, RecursionError):
        return None


def _objects(rows: Iterable[dict[str, str]], text_field: str, source: str) -> Iterator[dict[str, Any]]:
    """The objects of lines that are not blank; one without the text column has None there, which is said once."""
    for row in rows:
        if row["text"].strip():
            found = _parsed(row)
            if not isinstance(found, dict):
                raise UserError(
                    f"a line of {source} is no JSON object: {row['text'][:40]!r}; mend its file (data.dataset)"
                )
            if text_field not in found:  # of one row perhaps, perhaps of a whole file that names it otherwise
                warn_caller(f"{source}: rows without a column {text_field!r} are left out (data.text_field)")
            yield {text_field: None, **found}


def _check_first_row(split: Split) -> None:
    field = split.text_field
    try:
        rows = list(islice(split.rows, 1))
        columns = split.rows.column_names or []
    except Exception as error:  # network, pyarrow, json, ... ; datasets cannot stream an empty parquet file either
        raise UserError(
            f"{split.source} is empty or cannot be read ({reason_of(error)}), so no column {field!r} "
            "(data.text_field) was found; write another data.dataset or split"
        ) from error
    if not rows:
        raise UserError(
            f"corpus is empty: {split.source} has no rows, so no column {field!r} (data.text_field); columns: "
            f"{', '.join(columns) or 'none'}; write another data.dataset or split"
        )
    list(split.texts(rows))
