"""What a rank reads of a streamed data set: bytes by the kernel's count, tokens by the tokenizer's."""

from __future__ import annotations

import os
import time
from pathlib import Path
from unittest import mock


def read_share(folder: str, steps: int, batch: int) -> tuple[int, int, list[int]]:
    """Bytes read by this process for its sequences of some steps, tokens that it encoded, and the sequences' sums."""
    from loqt_scale.config import DataConfig
    from loqt_scale.data import build_corpus
    from loqt_scale.data.tokenizers import ByteTokenizer
    from loqt_scale.functional.shares import share

    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    config = DataConfig(dataset=folder, seq_len=64, streams=batch)
    corpus = build_corpus(config, seed=0, global_batch_size=batch)
    before, tokens, encode = _bytes_read(), 0, ByteTokenizer.encode_batch

    def counting(self: ByteTokenizer, texts: list[str]) -> list[list[int]]:
        nonlocal tokens
        ids = encode(self, texts)
        tokens += sum(map(len, ids))
        return ids

    with mock.patch.object(ByteTokenizer, "encode_batch", counting):
        sums = [
            int(row.sum())
            for step in range(steps)
            for row in corpus.train.sequences(step, *share(batch, rank, ranks)).input_ids
        ]
        before_rest = -1
        while before_rest != tokens:  # threads read ahead until they have enough; then they rest
            before_rest = tokens
            time.sleep(0.5)
        corpus.train.close()  # type: ignore[attr-defined]
    return _bytes_read() - before, tokens, sums


def _bytes_read() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])
