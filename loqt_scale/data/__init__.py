"""Text to training batches: `build_corpus` is the whole interface.

    corpora.py      documents of local files or of the embedded corpus
    hub.py          rows of a streamed data set
    tokenizers.py   text <-> ids
    packing.py      documents -> sequences of one length (pure)
    text_files.py   documents of one file
    token_store.py  local corpora, tokenized once, kept on disk
    tokenizing.py   how: by several processes, in order; a killed build goes on
    token_files.py  files of tokens that grow
    reading_bar.py  how far that is, and the time left
    cache.py        folders that one process builds while the others wait
    batching.py     a rank's share of them, in micro-batches; the loss, summed
    batches.py      which sequences a step reads; stored corpora, random access
    logical.py      the same for data sets that only go forward, as streams that ranks share among them
    pieces.py       which documents each of these streams reads
    streaming.py    one of them, read ahead by threads
    mixing.py       several of all these, by weight

Nothing here knows about ranks: each asks for its share of a step's global batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch

from loqt_scale.config import DataConfig
from loqt_scale.config.sources import shares_of
from loqt_scale.data.batches import AnotherTextError, Batch, Portion, StoredSequences, TrainStream, WholeBatch
from loqt_scale.data.batching import counted_bytes, counted_tokens
from loqt_scale.data.corpora import LocalText, embedded_text, files_text, joined_text
from loqt_scale.data.hub import held_out_windows, open_splits, split_lines
from loqt_scale.data.logical import LogicalStreams, join_positions, stream_count
from loqt_scale.data.mixing import MixedPortion, MixedTexts, Mixing, named_source
from loqt_scale.data.packing import Int64Array, evaluation_windows
from loqt_scale.data.pieces import Pieces, cut_into_pieces, training_windows
from loqt_scale.data.streaming import LogicalStream
from loqt_scale.data.token_store import default_cache_dir, tokenized, trained_bpe
from loqt_scale.data.tokenizers import Tokenizer, load_tokenizer
from loqt_scale.functional.seeding import stable_seed

_CHANGES_TOLD = 4  # of weights

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
        streams: Logical streams that ranks can share among them, of each text that is streamed.
        mixed: The training texts, of `data.sources`.
        held_out: Held-out sequences by source, of `data.sources`; together they are `eval`.
    """

    tokenizer: Tokenizer
    train: TrainStream
    eval: Batch
    description: str
    fingerprint: tuple[str, ...]
    occurring: Callable[[], int]
    streams: tuple[int, ...] = ()
    mixed: MixedTexts | None = None
    held_out: dict[str, Batch] = field(default_factory=dict)

    def bits_per_byte(self, loss: float) -> float:
        """A held-out loss in nats a token as bits for each byte of the held-out text: comparable between tokenizers."""
        return loss * self._tokens_per_byte / math.log(2.0)

    @cached_property
    def _tokens_per_byte(self) -> float:
        return counted_tokens(self.eval.labels) / max(1, counted_bytes(self.eval.labels, self.tokenizer))


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
    if config.sources:
        return _mixed(config, seed, global_batch_size)
    return _opened(config, _tokenizer(config), seed, WholeBatch(global_batch_size), global_batch_size)


def _opened(config: DataConfig, tokenizer: Tokenizer, seed: int, portion: Portion, global_batch_size: int) -> Corpus:
    """One text."""
    opened = _stored if config.dataset is None else _streamed
    return opened(config, tokenizer, seed, portion, global_batch_size)


def _mixed(config: DataConfig, seed: int, global_batch_size: int) -> Corpus:
    """Several of them; each is opened as if it were the only one, but for its tokenizer, its seed and its portion."""
    sources, tokenizer = config.mixture, _tokenizer(config)
    mixing = Mixing(shares_of(sources), seed=seed, global_batch_size=global_batch_size)
    found: dict[str, Corpus] = {}
    for number, source in enumerate(sources):
        portion, own_seed = MixedPortion(mixing, number), stable_seed("source", source.name, seed)
        with named_source(source.name):
            found[source.name] = _opened(config.of_source(source), tokenizer, own_seed, portion, global_batch_size)
    return _joined(found, mixing, config.seq_len)


def _joined(found: dict[str, Corpus], mixing: Mixing, seq_len: int) -> Corpus:
    parts = [*found.values()]
    mixed = MixedTexts({name: part.train for name, part in found.items()}, mixing, seq_len=seq_len)
    shares = zip(found.items(), mixing.weights(0), strict=True)
    lines = [f"         {name} ({share:.2%}): {part.description}" for (name, part), share in shares]
    for step in mixing.changes[:_CHANGES_TOLD]:
        now = (f"{name} {share:.2%}" for name, share in zip(found, mixing.weights(step), strict=True))
        lines.append(f"         after step {step}: {', '.join(now)}")
    if more := mixing.changes[_CHANGES_TOLD:]:
        lines.append(f"         and {len(more)} changes more, the last after step {more[-1]}")
    held_out = {name: part.eval for name, part in found.items()}
    return Corpus(
        parts[0].tokenizer,
        mixed,
        Batch(
            torch.cat([batch.input_ids for batch in held_out.values()]),
            torch.cat([batch.labels for batch in held_out.values()]),
        ),
        "\n".join([f"{len(parts)} sources, shares of tokens at step 0", *lines]),
        tuple(f"{name}: {line}" for name, part in found.items() for line in part.fingerprint),
        lambda: max(part.occurring() for part in parts),
        tuple(count for part in parts for count in part.streams),
        mixed,
        held_out,
    )


def _tokenizer(config: DataConfig) -> Tokenizer:
    if config.tokenizer != "bpe":
        return load_tokenizer(config.tokenizer)
    texts = [_local_text(config.of_source(source)) for source in config.mixture] or [_local_text(config)]
    size, held_out = config.bpe_vocab_size, config.eval_fraction
    return trained_bpe(joined_text(texts), vocab_size=size, eval_fraction=held_out, cache_dir=_cache_dir(config))


def _local_text(config: DataConfig) -> LocalText:
    return files_text(config.files, config.text_field) if config.files else embedded_text()


def _cache_dir(config: DataConfig) -> Path:
    return Path(config.cache_dir) if config.cache_dir else default_cache_dir()


def _stored(config: DataConfig, tokenizer: Tokenizer, seed: int, portion: Portion, global_batch_size: int) -> Corpus:
    text = _local_text(config)
    store = tokenized(text, tokenizer, eval_fraction=config.eval_fraction, cache_dir=_cache_dir(config))
    train = StoredSequences(
        store.train,
        seq_len=config.seq_len,
        seed=seed,
        global_batch_size=global_batch_size,
        digest=store.train_digest,
        portion=portion,
    )
    held_out = _evaluation_batch(
        *evaluation_windows(store.eval, config.seq_len, config.max_eval_sequences, tokenizer.eos_token_id)
    )
    scored = counted_tokens(held_out.labels)
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


def _streamed(config: DataConfig, tokenizer: Tokenizer, seed: int, portion: Portion, global_batch_size: int) -> Corpus:
    train_split, eval_split = open_splits(config)
    held_out = _evaluation_batch(*held_out_windows(eval_split, tokenizer, config))
    wanted = partial(stream_count, config.streams, global_batch_size)
    pieces = cut_into_pieces(train_split, streams=wanted, seed=seed)
    per_step = global_batch_size // pieces.streams
    train = LogicalStreams(
        partial(_open_stream, pieces, tokenizer, config.seq_len, portion, per_step),
        streams=pieces.streams,
        text=pieces.origin,
        seq_len=config.seq_len,
        global_batch_size=global_batch_size,
        portion=portion,
        pieces=pieces.count,
    )
    name = config.dataset if config.dataset_config is None else f"{config.dataset}/{config.dataset_config}"
    description = (
        f"{name} (streamed), tokenizer {tokenizer.name}: train split {config.split!r}, {pieces.streams} logical "
        f"streams over {pieces.description}; eval split {config.eval_split!r}, "
        f"{counted_tokens(held_out.labels):,} tokens scored"
    )
    fingerprint = (_tokenizer_line(tokenizer), *split_lines(config, train_split, eval_split), _batch_line(held_out))
    return Corpus(
        tokenizer,
        train,
        held_out,
        description,
        fingerprint,
        lambda: tokenizer.token_count,
        (pieces.streams,),
    )


def _open_stream(
    pieces: Pieces, tokenizer: Tokenizer, seq_len: int, portion: Portion, per_step: int, number: int
) -> LogicalStream:
    def taken(step: int) -> int:
        return portion.within(step, number * per_step, (number + 1) * per_step)

    windows = partial(training_windows, pieces, number, tokenizer, seq_len)
    return LogicalStream(windows, per_step=per_step, taken=taken)


def _tokenizer_line(tokenizer: Tokenizer) -> str:
    return f"tokenizer: {tokenizer.name}, digest {tokenizer.fingerprint}"


def _batch_line(batch: Batch) -> str:
    digest = hashlib.blake2b(batch.input_ids.numpy().tobytes() + batch.labels.numpy().tobytes(), digest_size=16)
    return f"held-out text: {batch.input_ids.shape[0]} sequences, digest {digest.hexdigest()}"


def _evaluation_batch(inputs: Int64Array, labels: Int64Array) -> Batch:
    return Batch(input_ids=torch.from_numpy(inputs), labels=torch.from_numpy(labels))
