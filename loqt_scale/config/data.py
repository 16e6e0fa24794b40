"""The group of settings that says which text is read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from loqt_scale.config.check import MANY, PATH, check_values, require
from loqt_scale.config.sources import SourceConfig, read_sources


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text is read, and how it is cut into sequences.

    Args:
        files: Text (.txt), JSON lines (.jsonl, .json) or parquet files, the first two perhaps compressed (.gz, .bz2,
            .xz, .zst); folders and globs allowed. Empty = `dataset`, or the embedded corpus.
        dataset: Hugging Face data set id (e.g. allenai/c4) or a folder of one; streamed.
        dataset_config: Its configuration name (e.g. en).
        split: Split of `dataset` that is trained on.
        eval_split: Split of `dataset` that is held out.
        sources: Several texts in place of `files` and `dataset`: a list of {name, files or dataset, weight}, each with
            a dataset_config, split, eval_split and text_field of its own, or with those written here. A source's share
            of the tokens is its weight (default 1) over the sum of all. It changes when so many steps are done with
            weight: [{from_step: 0, weight: 1}, {from_step: 9000, weight: 3}].
        streams: Logical streams of `dataset`, which divide `train.global_batch_size`: each is a part of the text that
            one rank reads and tokenizes, so their number is to be a multiple of the number of ranks. Default: the
            greatest divisor up to 64 (up to 8, or the number of files, if those are fewer than 64).
        text_field: Column of JSON, parquet or data-set rows that holds the text.
        tokenizer: bytes = one token a byte; bpe = a byte-level BPE trained on the corpus, on its first 64 million
            characters if it is larger; else a folder or Hugging Face id for `AutoTokenizer`.
        bpe_vocab_size: Vocabulary of `tokenizer: bpe`.
        seq_len: Tokens per sequence that are predicted.
        mask_documents: A sequence holds several documents; true = they do not see one another: attention ends and
            positions begin anew where a document begins, which is at its end-of-text token.
        eval_fraction: Share of the documents held out for evaluation (files and embedded corpus).
        max_eval_sequences: At most this many held-out sequences are scored.
        cache_dir: Where tokenized corpora are kept. Default: $XDG_CACHE_HOME/loqt_scale or ~/.cache/loqt_scale.
    """

    files: list[str] = field(default_factory=list, metadata=PATH)
    dataset: str | None = field(default=None, metadata=PATH)
    dataset_config: str | None = None
    split: str = "train"
    eval_split: str = "validation"
    sources: list[dict[str, Any]] = field(default_factory=list)
    streams: int | None = None
    text_field: str = "text"
    tokenizer: str = field(default="bytes", metadata=PATH)
    bpe_vocab_size: int = 4096
    seq_len: int = 256
    mask_documents: bool = False
    eval_fraction: float = 0.02
    max_eval_sequences: int = 256
    cache_dir: str | None = field(default=None, metadata=PATH)

    def __post_init__(self) -> None:
        check_values(self, "data")
        object.__setattr__(self, "sources", [source.settings() for source in self.mixture])
        for other in ("files", "dataset"):
            require(
                not (self.sources and getattr(self, other)),
                f"data.sources and data.{other} are both set; write one of them (the other as [] or null)",
            )
        require(
            not (self.files and self.dataset),
            "data.files and data.dataset are both set; write one of them (the other as [] or null)",
        )
        require(2 <= self.seq_len <= MANY, f"data.seq_len is {self.seq_len}; write 2 to {MANY} tokens")
        require(0.0 < self.eval_fraction < 1.0, f"data.eval_fraction is {self.eval_fraction}; write a number in (0, 1)")
        require(self.max_eval_sequences >= 1, f"data.max_eval_sequences is {self.max_eval_sequences}; write 1 or more")
        streamed = self.dataset is not None or any(source.dataset is not None for source in self.mixture)
        require(
            not (self.tokenizer == "bpe" and streamed),
            "data.tokenizer is 'bpe', which is trained on local text, but data.dataset is streamed; "
            "write data.tokenizer: FOLDER or a Hugging Face id, or 'bytes'",
        )
        require(
            self.streams is None or 1 <= self.streams <= MANY,
            f"data.streams is {self.streams}; write 1 to {MANY}, or null",
        )
        require(
            self.streams is None or streamed,
            f"data.streams is {self.streams}, but only a streamed data set (data.dataset) is read by logical streams: "
            "files are tokenized once, and each rank reads what it needs; write data.streams: null",
        )
        size = self.bpe_vocab_size
        require(300 <= size <= MANY, f"data.bpe_vocab_size is {size}; write 300 to {MANY}")

    @property
    def mixture(self) -> tuple[SourceConfig, ...]:
        """The sources; none: `files`, `dataset` or the embedded corpus alone."""
        return read_sources(self.sources)

    def of_source(self, source: SourceConfig) -> DataConfig:
        """The settings of one source alone."""
        of_data = ("dataset_config", "split", "eval_split", "text_field")
        own = {key: value for key in of_data if (value := getattr(source, key)) is not None}
        streams = None if source.dataset is None else self.streams
        return replace(self, sources=[], files=list(source.files), dataset=source.dataset, streams=streams, **own)
