"""Text to training batches: `build_corpus` is the whole interface.

    corpora.py      documents of local files or of the embedded corpus
    hub.py          rows of a streamed data set
    tokenizers.py   text <-> ids
    packing.py      documents -> sequences of one length (pure)
    token_store.py  local corpora, tokenized once, kept on disk
    cache.py        folders that one process builds while the others wait
    batching.py     a rank's share of them, in micro-batches; the loss, summed
    batches.py      which sequences a step reads; stored corpora, random access
    logical.py      the same for data sets that only go forward, as streams that ranks share among them
    pieces.py       which documents each of these streams reads
    streaming.py    one of them, read ahead in a thread

Nothing here knows about ranks: each asks for its share of a step's global batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from loqt_scale.config import DataConfig
from loqt_scale.data.batches import AnotherTextError, Batch, StoredSequences, TrainStream
from loqt_scale.data.corpora import embedded_text, files_text
from loqt_scale.data.hub import held_out_windows, open_splits, split_lines
from loqt_scale.data.logical import LogicalStreams, join_positions, stream_count
from loqt_scale.data.packing import Int64Array, evaluation_windows
from loqt_scale.data.pieces import Pieces, cut_into_pieces, training_windows
from loqt_scale.data.streaming import LogicalStream
from loqt_scale.data.token_store import default_cache_dir, tokenized, trained_bpe
from loqt_scale.data.tokenizers import Tokenizer, load_tokenizer

__all__ = ["AnotherTextError", "Batch", "Corpus", "Tokenizer", "TrainStream", "build_corpus", "join_positions"]


@dataclass(frozen=True)
class Corpus:
    """Everything a run reads.

    Args:
        tokenizer: Text <-> ids.
        train: Training sequences by step.
        eval: (N, T) held-out sequences, 1 <= N <= `DataConfig.max_eval_sequences`; the same ones every time.
        description: One line: source, tokenizer, tokens in train and eval.
        fingerprint: What must be the same on every rank: lines that change with the tokenizer's ids and with the text.
        occurring: Reads how many rows of an embedding its ids need: one more than the greatest. Of a stream, which
            cannot be read beforehand, the tokenizer's greatest.
        streams: Logical streams that ranks can share among them; None: text that each rank reads as it needs it.
    """

    tokenizer: Tokenizer
    train: TrainStream
    eval: Batch
    description: str
    fingerprint: tuple[str, ...]
    occurring: Callable[[], int]
    streams: int | None = None


def build_corpus(config: DataConfig, *, seed: int, global_batch_size: int) -> Corpus:
    """Open the text a configuration names.

    Every rank may call it at the same time: a local corpus is tokenized by one process per machine (more exactly, per
    cache folder) while the others wait.

    Args:
        config: What to read and how to cut it.
        seed: Seed of the order of training sequences.
        global_batch_size: B, sequences per step over all ranks.

    Raises:
        FileNotFoundError: A file, glob, tokenizer folder or data-set folder does not exist.
        ValueError: Anything else that is wrong with the text or its settings; the message says what to write instead.
    """
    if global_batch_size < 1:
        raise ValueError(f"global_batch_size is {global_batch_size}; write 1 or more")
    if config.dataset is not None:
        return _streamed(config, seed, global_batch_size)
    return _stored(config, seed, global_batch_size)


def _stored(config: DataConfig, seed: int, global_batch_size: int) -> Corpus:
    text = files_text(config.files, config.text_field) if config.files else embedded_text()
    cache_dir = Path(config.cache_dir) if config.cache_dir else default_cache_dir()
    if config.tokenizer == "bpe":
        tokenizer = trained_bpe(
            text, vocab_size=config.bpe_vocab_size, eval_fraction=config.eval_fraction, cache_dir=cache_dir
        )
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    store = tokenized(text, tokenizer, eval_fraction=config.eval_fraction, cache_dir=cache_dir)
    train = StoredSequences(
        store.train,
        seq_len=config.seq_len,
        seed=seed,
        global_batch_size=global_batch_size,
        digest=store.train_digest,
    )
    held_out = _evaluation_batch(
        *evaluation_windows(store.eval, config.seq_len, config.max_eval_sequences, tokenizer.eos_token_id)
    )
    scored = int((held_out.labels >= 0).sum())
    description = (
        f"{text.name}, tokenizer {tokenizer.name}: train {len(store.train):,} tokens in {store.train_documents:,} "
        f"documents; eval {len(store.eval):,} tokens in {store.eval_documents:,} documents, {scored:,} scored"
    )
    text_lines = tuple(
        f"{side} text: {len(tokens)} tokens, digest {digest}"
        for side, tokens, digest in (
            ("training", store.train, store.train_digest),
            ("held-out", store.eval, store.eval_digest),
        )
    )
    fingerprint = (_tokenizer_line(tokenizer), *text_lines)
    sides = (store.train, store.eval)
    return Corpus(
        tokenizer,
        train,
        held_out,
        description,
        fingerprint,
        lambda: 1 + max(tokenizer.eos_token_id, *(int(side.max()) for side in sides if len(side))),
    )


def _streamed(config: DataConfig, seed: int, global_batch_size: int) -> Corpus:
    tokenizer = load_tokenizer(config.tokenizer)
    train_split, eval_split = open_splits(config)
    held_out = _evaluation_batch(*held_out_windows(eval_split, tokenizer, config))
    wanted = partial(stream_count, config.streams, global_batch_size)
    pieces = cut_into_pieces(train_split, streams=wanted, seed=seed)
    train = LogicalStreams(
        partial(_open_stream, pieces, tokenizer, config.seq_len, global_batch_size // pieces.streams),
        streams=pieces.streams,
        text=pieces.origin,
        seq_len=config.seq_len,
        global_batch_size=global_batch_size,
    )
    name = config.dataset if config.dataset_config is None else f"{config.dataset}/{config.dataset_config}"
    description = (
        f"{name} (streamed), tokenizer {tokenizer.name}: train split {config.split!r}, {pieces.streams} logical "
        f"streams over {pieces.description}; eval split {config.eval_split!r}, "
        f"{int((held_out.labels >= 0).sum()):,} tokens scored"
    )
    fingerprint = (_tokenizer_line(tokenizer), *split_lines(config, train_split, eval_split), _batch_line(held_out))
    return Corpus(tokenizer, train, held_out, description, fingerprint, lambda: tokenizer.token_count, pieces.streams)


def _open_stream(pieces: Pieces, tokenizer: Tokenizer, seq_len: int, per_step: int, number: int) -> LogicalStream:
    return LogicalStream(partial(training_windows, pieces, number, tokenizer, seq_len), per_step=per_step)


def _tokenizer_line(tokenizer: Tokenizer) -> str:
    return f"tokenizer: {tokenizer.name}, digest {tokenizer.fingerprint}"


def _batch_line(batch: Batch) -> str:
    digest = hashlib.blake2b(batch.input_ids.numpy().tobytes() + batch.labels.numpy().tobytes(), digest_size=16)
    return f"held-out text: {batch.input_ids.shape[0]} sequences, digest {digest.hexdigest()}"


def _evaluation_batch(inputs: Int64Array, labels: Int64Array) -> Batch:
    return Batch(input_ids=torch.from_numpy(inputs), labels=torch.from_numpy(labels))
