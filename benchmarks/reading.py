"""Tokens/s of reading a streamed data set on one core, against what training would need.

    taskset -c 1 python benchmarks/reading.py TEXT.txt [--megabytes 16] [--streams 8] [--gpu-flops 4e14]

The text is cut at blank lines into documents and written as JSONL and as parquet files. They are read as a run reads
them: logical streams, shuffled, tokenized by bytes and by a BPE trained on the same text, packed.

What is needed: eight GPUs that train the paper's 1b shape, 6 N FLOPs a token with its 1.34e9 weights, at `--gpu-flops`
of useful work a second on each (default: an H100 at 40 % of its dense bfloat16 peak).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from loqt_scale.config import DataConfig
from loqt_scale.data import build_corpus
from loqt_scale.data.tokenizers import train_bpe

WEIGHTS_1B, GPUS, SEQ_LEN, BATCH, VOCABULARY = 1.34e9, 8, 256, 64, 32_000


def documents(path: Path, megabytes: float) -> list[str]:
    """The first documents of a text file."""
    with path.open(encoding="utf-8", errors="replace") as file:
        text = file.read(int(megabytes * 1e6))
    return [block for block in text.split("\n\n") if block.strip()]


def write_sets(rows: list[str], folder: Path, files: int) -> dict[str, Path]:
    """The same documents as a folder of JSONL files and as one of parquet files."""
    sets = {kind: folder / kind for kind in ("jsonl", "parquet")}
    for path in sets.values():
        path.mkdir()
    parts = {f"train-{number:03d}": rows[number::files] for number in range(files)} | {"validation": rows[:20]}
    for name, part in parts.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (sets["jsonl"] / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        pq.write_table(pa.table({"text": part}), sets["parquet"] / f"{name}.parquet")
    return sets


def tokens_per_second(folder: Path, tokenizer: str, streams: int, seconds: float) -> float:
    """What the trainer can take of a data set's sequences."""
    config = DataConfig(dataset=str(folder), tokenizer=tokenizer, seq_len=SEQ_LEN, streams=streams)
    text = build_corpus(config, seed=0, global_batch_size=BATCH).train
    text.sequences(0, 0, BATCH)  # opens files, imports
    step, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        step += 1
        text.sequences(step, 0, BATCH)
    text.close()  # type: ignore[attr-defined]
    return step * BATCH * SEQ_LEN / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--megabytes", type=float, default=16.0)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--gpu-flops", type=float, default=4e14)
    options = parser.parse_args()
    needed = options.gpu_flops / (6 * WEIGHTS_1B)
    print(f"needed: {needed:,.0f} tokens/s a GPU, {GPUS * needed:,.0f} on {GPUS} (6 x {WEIGHTS_1B:.3g} FLOPs a token)")
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), documents(options.text, options.megabytes)
        train_bpe(rows, VOCABULARY, folder / "bpe")
        for kind, path in write_sets(rows, folder, options.streams).items():
            for tokenizer in ("bytes", str(folder / "bpe")):
                rate = tokens_per_second(path, tokenizer, options.streams, options.seconds)
                print(f"{kind:8}{Path(tokenizer).name:6}{rate:12,.0f} tokens/s  {rate / needed:6.1f} x a GPU's need")


if __name__ == "__main__":
    main()
