"""Data sets that are streamed: a Hugging Face id, or a folder of one, named by `data.dataset`.

Such a data set may be larger than any disk here, so it is read row by row as training goes on. Its publisher has split
it already: `data.split` is trained on and `data.eval_split` is held out, and nothing is re-split here. The order is the
library's own: shards in an order drawn from (seed, epoch), rows through a shuffle buffer. Both are the same in every
process, so all ranks see one and the same stream.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loqt_scale.config import DataConfig
from loqt_scale.data.packing import Int64Array, cut_windows, evaluation_windows, join_documents, text_groups
from loqt_scale.data.streaming import Chunk, Place
from loqt_scale.data.text_files import row_texts
from loqt_scale.data.tokenizers import Tokenizer
from loqt_scale.errors import MissingFileError, UserError, explained, reason_of

if TYPE_CHECKING:  # it takes seconds to import, which the embedded corpus need not pay
    import datasets

SHUFFLE_ROWS = 10_000
"""Rows in the shuffle buffer: filled before the first sequence comes out."""

_ENCODE_CHARS = 200_000  # text tokenized at once; small, because the first batch waits for it


def open_splits(config: DataConfig) -> tuple[datasets.IterableDataset, datasets.IterableDataset]:
    """Open the training and the held-out split of `config.dataset`, and look at one row of each.

    Returns:
        The training split and the held-out split, streaming, unshuffled.

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
        _check_first_row(splits[name], f"split {name!r} of {config.dataset}", config.text_field)
    return splits[config.split], splits[config.eval_split]


def split_lines(config: DataConfig, *splits: datasets.IterableDataset) -> tuple[str, ...]:
    """What tells one copy of a data set from another before it is read through: its files and its first row."""
    assert config.dataset is not None
    lines = [f"{split.split}: first row, digest {_row_digest(split)}" for split in splits]
    folder = Path(config.dataset)
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("[!.]*") if path.is_file())
        lines += [f"{path.relative_to(folder)}: {path.stat().st_size} bytes" for path in files]
    return tuple(lines)


def _row_digest(split: datasets.IterableDataset) -> str:
    row = next(iter(split), None)
    return hashlib.blake2b(repr(row).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def training_windows(
    split: datasets.IterableDataset, tokenizer: Tokenizer, config: DataConfig, seed: int, start: Place
) -> Iterator[Chunk]:
    """Tokenize and pack a split for ever, shuffled anew each epoch.

    Epochs are laid end to end like documents: a sequence may begin in one and end in the next.

    Args:
        split: From `open_splits`.
        tokenizer: Gives the ids and the token after each document.
        config: Names the text column and T.
        seed: Seed of the order.
        start: Where to begin; what lies before it in its epoch is read, but not tokenized.

    Yields:
        (m, T + 1) int64, m >= 1, and the place that they begin at.

    Raises:
        ValueError: A row has no text column, a whole epoch is shorter than one sequence, or no stream of this
            tokenizer and T was ever at `start`.
    """
    if len(start.rest) > config.seq_len or max(start.rest, default=0) >= tokenizer.vocab_size:
        raise UserError(f"{len(start.rest)} tokens up to {max(start.rest)} do not wait in this stream")
    shuffled = split.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS)
    rest = np.asarray(start.rest, dtype=np.int64)
    texts, tokens = start.texts, start.tokens
    for epoch in count(start.epoch):
        shuffled.set_epoch(epoch)
        rows = islice(_texts(shuffled, config.text_field, f"split {config.split!r}"), texts, None)
        for group in text_groups(rows, _ENCODE_CHARS):
            place = Place(epoch=epoch, texts=texts, tokens=tokens, rest=tuple(rest.tolist()))
            chunk = join_documents(tokenizer.encode_batch(group), tokenizer.eos_token_id)
            texts, tokens = texts + len(group), tokens + len(chunk)
            windows, rest = cut_windows(np.concatenate([rest, chunk]), config.seq_len)
            if len(windows):
                yield windows, place
        if tokens <= config.seq_len:
            raise UserError(
                f"corpus smaller than one sequence: split {config.split!r} of {config.dataset} has {tokens} "
                f"tokens, and data.seq_len {config.seq_len} needs {config.seq_len + 1}; write a smaller "
                "data.seq_len"
            )
        texts = tokens = 0


def held_out_windows(
    split: datasets.IterableDataset, tokenizer: Tokenizer, config: DataConfig
) -> tuple[Int64Array, Int64Array]:
    """Return the first `config.max_eval_sequences` sequences of the held-out split, in its own order.

    Returns:
        inputs and labels, each (N, T) int64, as `packing.evaluation_windows` makes them.

    Raises:
        ValueError: The split holds no text.
    """
    wanted = config.max_eval_sequences * config.seq_len + 1
    chunks: list[Int64Array] = []
    for chunk in _tokenized(split, tokenizer, config.text_field, f"split {config.eval_split!r}"):
        chunks.append(chunk)
        wanted -= len(chunk)
        if wanted <= 0:
            break
    if not chunks:
        raise UserError(
            f"corpus is empty: split {config.eval_split!r} of {config.dataset} holds no text in column "
            f"{config.text_field!r}; write another data.eval_split or data.text_field"
        )
    tokens = np.concatenate(chunks)[: config.max_eval_sequences * config.seq_len + 1]
    return evaluation_windows(tokens, config.seq_len, config.max_eval_sequences, tokenizer.eos_token_id)


def _load(config: DataConfig) -> dict[str, Any]:
    import datasets

    assert config.dataset is not None
    try:
        builder = datasets.load_dataset_builder(config.dataset, config.dataset_config)
        splits = dict(builder.as_streaming_dataset())
        for name in splits.keys() & {config.split, config.eval_split}:
            splits[name] = _text_only(builder, splits[name], str(name), config.text_field)
        return splits
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


def _text_only(builder: Any, split: datasets.IterableDataset, name: str, text_field: str) -> datasets.IterableDataset:
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
        if text_field not in (split.column_names or []):
            return split
        return datasets.load_dataset("parquet", data_files=files, columns=[text_field], streaming=True)[name]
    lines = datasets.load_dataset("text", data_files=files, streaming=True)[name]
    lines = lines.filter(lambda row: bool(row["text"].strip()))
    first = _parsed(next(iter(lines), {"text": ""}))
    if not isinstance(first, dict) or text_field not in first:
        return split  # a list, or no JSON, or another column: the library says which
    checked = partial(_checked, text_field=text_field, source=f"split {name!r}")
    return lines.map(checked, remove_columns=["text"])


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


def _checked(row: dict[str, str], text_field: str, source: str) -> dict[str, Any]:
    """A line's object, which has the text column."""
    found = _parsed(row)
    if not isinstance(found, dict):
        raise UserError(f"a line of {source} is no JSON object: {row['text'][:40]!r}; mend its file (data.dataset)")
    return {text_field: None, **found}


def _check_first_row(split: datasets.IterableDataset, source: str, text_field: str) -> None:
    try:
        rows = list(islice(split, 1))
    except Exception as error:  # network, pyarrow, json, ... ; datasets cannot stream an empty parquet file either
        raise UserError(
            f"{source} is empty or cannot be read ({reason_of(error)}), so no column {text_field!r} (data.text_field) "
            "was found; write another data.dataset or split"
        ) from error
    if not rows:
        raise UserError(
            f"corpus is empty: {source} has no rows, so no column {text_field!r} (data.text_field); columns: "
            f"{', '.join(split.column_names or []) or 'none'}; write another data.dataset or split"
        )
    list(row_texts(rows, text_field, source))


def _tokenized(
    rows: datasets.IterableDataset, tokenizer: Tokenizer, text_field: str, source: str
) -> Iterator[Int64Array]:
    for group in text_groups(_texts(rows, text_field, source), _ENCODE_CHARS):
        yield join_documents(tokenizer.encode_batch(group), tokenizer.eos_token_id)


def _texts(rows: datasets.IterableDataset, text_field: str, source: str) -> Iterator[str]:
    """The texts of rows that come over a network, through several libraries with errors of their own."""
    with explained(f"{source} cannot be read to its end", "start the run again: it goes on from its last checkpoint"):
        yield from row_texts(rows, text_field, source)
