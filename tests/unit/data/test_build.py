"""`build_corpus` end to end: embedded, files, and streamed from a local folder."""

from __future__ import annotations

import gc
import gzip
import json
import lzma
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loqt_scale.config import DataConfig, RunConfig, TrainConfig
from loqt_scale.data import AnotherTextError, Corpus, build_corpus, join_positions
from loqt_scale.data.hub import open_splits
from loqt_scale.data.logical import LogicalStreams
from loqt_scale.data.packing import cut_windows
from loqt_scale.data.tokenizers import ByteTokenizer
from loqt_scale.errors import ConfigError
from loqt_scale.functional.shares import share

T = 8
TRAIN = [f"training text number {i:03d}" for i in range(60)]
HELD_OUT = [f"held-out {i}" for i in range(9)]


def write_jsonl(path: Path, rows: list[str], field: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: row}) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard in range(3):
        write_jsonl(tmp_path / "set" / f"train-{shard:05d}-of-00003.jsonl", TRAIN[shard::3])
    write_jsonl(tmp_path / "set" / "validation.jsonl", HELD_OUT)
    return tmp_path / "set"


def build(global_batch_size: int = 4, seed: int = 0, **settings: Any) -> Corpus:
    return build_corpus(DataConfig(**{"seq_len": T} | settings), seed=seed, global_batch_size=global_batch_size)


def read(corpus: Corpus, steps: int, batch_size: int = 4) -> torch.Tensor:
    return torch.cat([corpus.train.sequences(step, 0, batch_size).input_ids for step in range(steps)])


def documents_of(ids: torch.Tensor) -> list[str]:
    tokens = ids.flatten().tolist()
    tokenizer = ByteTokenizer()
    ends = [i for i, token in enumerate(tokens) if token == tokenizer.eos_token_id]
    return [tokenizer.decode(tokens[a + 1 : b]) for a, b in zip([-1, *ends], ends, strict=False)]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def test_embedded_corpus_is_the_default(cache_dir: str) -> None:
    corpus = build(seq_len=256, cache_dir=cache_dir)
    batch = corpus.train.sequences(10**6, 0, 4)
    assert batch.input_ids.shape == (4, 256)
    assert 0 < len(corpus.eval.input_ids) <= 256
    assert corpus.description.startswith("embedded corpus") and "\n" not in corpus.description
    assert int(batch.input_ids.max()) < corpus.tokenizer.vocab_size == 320


def test_files_with_each_tokenizer(tmp_path: Path, cache_dir: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(TRAIN))
    ByteTokenizer().save(tmp_path / "tokenizer")
    for tokenizer in ("bytes", "bpe", str(tmp_path / "tokenizer")):
        corpus = build(files=[str(path)], tokenizer=tokenizer, bpe_vocab_size=300, cache_dir=cache_dir)
        assert corpus.train.sequences(0, 1, 3).labels.shape == (2, T)
        assert "train" in corpus.description and "eval" in corpus.description
        assert int((corpus.eval.labels >= 0).sum()) > 0


def test_eval_counts_every_held_out_token_once(tmp_path: Path, cache_dir: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(TRAIN))
    corpus = build(files=[str(path)], eval_fraction=0.3, cache_dir=cache_dir)
    kept = corpus.eval.labels[corpus.eval.labels >= 0]
    held_out = documents_of(torch.cat([corpus.eval.input_ids[0, :1], kept]))
    assert set(held_out) < {text + "\n" for text in TRAIN} | {TRAIN[-1]}
    assert len(held_out) == len(set(held_out)) > 5


def test_data_errors_come_out_of_build(tmp_path: Path, cache_dir: str) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(FileNotFoundError, match=r"data\.files"):
        build(files=[str(path)], cache_dir=cache_dir)
    path.write_text("a\n\nb")
    with pytest.raises(ValueError, match="corpus smaller than one sequence"):
        build(files=[str(path)], cache_dir=cache_dir)
    path.write_text("")
    with pytest.raises(ValueError, match="corpus is empty"):
        build(files=[str(path)], cache_dir=cache_dir)
    with pytest.raises(ValueError, match="global_batch_size is 0"):
        build(0, files=[str(path)])


def test_stream_trains_on_one_split_and_holds_out_the_other(folder: Path) -> None:
    corpus = build(dataset=str(folder), streams=1)
    epoch = sum(len(text) + 1 for text in TRAIN)
    read_once = documents_of(read(corpus, epoch // (4 * T)))
    assert set(read_once) <= set(TRAIN) and len(read_once) == len(set(read_once)) >= len(TRAIN) - 2
    assert read_once != TRAIN[: len(read_once)]  # shuffled
    kept = corpus.eval.labels[corpus.eval.labels >= 0]
    assert documents_of(torch.cat([corpus.eval.input_ids[0, :1], kept])) == HELD_OUT
    assert "streamed" in corpus.description and str(folder) in corpus.description


def test_stream_wraps_over_epochs_in_a_new_order(folder: Path) -> None:
    tokens = sum(len(text) + 1 for text in TRAIN)
    read_thrice = documents_of(read(build(dataset=str(folder), streams=1), 3 * tokens // (4 * T)))
    epochs = [read_thrice[i * len(TRAIN) : (i + 1) * len(TRAIN)] for i in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(TRAIN)
    assert epochs[0] != epochs[1]


def test_stream_depends_on_seed_and_step_only(folder: Path) -> None:
    whole = read(build(dataset=str(folder)), 6)
    ranks = [build(dataset=str(folder)) for _ in range(2)]
    shares = [ranks[i].train.sequences(s, 2 * i, 2 * i + 2).input_ids for s in range(6) for i in range(2)]
    assert torch.equal(torch.cat(shares), whole)
    assert torch.equal(build(dataset=str(folder)).train.sequences(5, 0, 4).input_ids, whole[-4:])
    assert not torch.equal(read(build(dataset=str(folder), seed=1), 6), whole)


def test_stream_goes_on_without_tokenizing_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions of three epochs, cut into small groups: the same sequences from there on, and few texts tokenized."""
    monkeypatch.setattr("loqt_scale.data.pieces._ENCODE_CHARS", 40)
    monkeypatch.setattr("loqt_scale.data.pieces.SHUFFLED_ROWS", 24)
    steps = 3 * sum(len(text) + 1 for text in TRAIN) // (4 * T)
    corpus = build(dataset=str(folder))
    whole = [corpus.train.sequences(step, 0, 4).input_ids for step in range(steps)]
    tokenized: list[str] = []
    encode = ByteTokenizer.encode_batch

    def listening(self: ByteTokenizer, texts: list[str]) -> list[list[int]]:
        tokenized.extend(texts)
        return encode(self, texts)

    for step in (0, 1, steps // 5, steps // 2, steps - 2):
        before = build(dataset=str(folder))
        if step:
            before.train.sequences(step - 1, 0, 4)
        position = json.loads(json.dumps(before.train.position()))
        after = build(dataset=str(folder))
        with monkeypatch.context() as patched:
            patched.setattr(
                ByteTokenizer, "encode_batch", lambda self, texts: tokenized.extend(texts) or encode(self, texts)
            )
            after.train.seek(step, position)
            assert torch.equal(after.train.sequences(step, 0, 4).input_ids, whole[step])
            assert torch.equal(after.train.sequences(step + 1, 0, 4).input_ids, whole[step + 1])
            after.train.close()
    assert max(place["piece"] for place in position["places"].values()) > 3, "of six pieces over four streams"
    assert len(tokenized) < 5 * len(TRAIN), "all before the last place is 2 epochs alone"


def test_stream_of_parquet_with_its_own_splits_and_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    # The library sleeps at the end of each shuffled epoch of parquet, to let Arrow's threads end.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05)
    for split, rows in (("train", TRAIN), ("test", HELD_OUT)):
        pq.write_table(pa.table({"content": rows}), tmp_path / f"{split}.parquet")
    corpus = build(dataset=str(tmp_path), eval_split="test", text_field="content", max_eval_sequences=3)
    joined = np.array([i for text in HELD_OUT for i in [*text.encode(), 256]])
    first = cut_windows(joined, T)[0][:3]
    assert torch.equal(corpus.eval.input_ids, torch.from_numpy(first[:, :-1]))
    assert torch.equal(corpus.eval.labels, torch.from_numpy(first[:, 1:]))
    assert corpus.train.sequences(2, 0, 4).input_ids.shape == (4, T)


def test_missing_splits_list_the_available_ones(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no split 'test'; write data\.eval_split: one of train, validation"):
        build(dataset=str(folder), eval_split="test")
    with pytest.raises(ValueError, match=r"no split 'all'; write data\.split: one of train, validation"):
        build(dataset=str(folder), split="all")
    with pytest.raises(ValueError, match=r"both 'train'.*data\.eval_split"):
        build(dataset=str(folder), eval_split="train")


def test_stream_without_the_column_lists_the_columns(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no column 'content'; write data\.text_field: one of text"):
        build(dataset=str(folder), text_field="content")


def test_unknown_data_sets_are_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nope is not a data set .*data\.dataset"):
        build(dataset=str(tmp_path / "nope"))
    with pytest.raises(ValueError, match=r"cannot be opened .*data\.dataset_config"):
        build(dataset=str(folder), dataset_config="en")


def test_streams_without_text_are_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ["abc"])
    write_jsonl(tmp_path / "validation.jsonl", [" "])
    with pytest.raises(ValueError, match=r"corpus is empty: split 'validation' .*data\.text_field"):
        build(dataset=str(tmp_path))
    write_jsonl(tmp_path / "validation.jsonl", ["text"])
    corpus = build(dataset=str(tmp_path))
    with pytest.raises(ValueError, match=r"smaller than one sequence: split 'train' .* has 4 tokens.*data\.seq_len"):
        corpus.train.sequences(0, 0, 1)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_stream_with_an_empty_split_is_refused(tmp_path: Path, kind: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split, rows in (("train", []), ("validation", HELD_OUT)):
        path = tmp_path / f"{split}.{kind}"
        if kind == "jsonl":
            write_jsonl(path, rows)
        else:
            pq.write_table(pa.table({"text": pa.array(rows, pa.string())}), path)
    with pytest.raises(ValueError, match=r"empty.*write .*data\.dataset"):
        build(dataset=str(tmp_path))


def test_a_column_that_changes_its_type_in_the_middle_of_a_shard(tmp_path: Path) -> None:
    """Behind the 10 MB from which the library takes its types."""
    rows = [{"text": f"row {i} " + "x" * 500, "n": i} for i in range(24_000)]
    rows += [{"text": "late", "n": {"a": ["b"]}}, {"n": "three", "text": "later", "url": None}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_jsonl(tmp_path / "validation.jsonl", HELD_OUT)
    split, _ = open_splits(DataConfig(dataset=str(tmp_path)))
    assert (tmp_path / "train.jsonl").stat().st_size > 12_000_000
    assert list(split.texts(split.rows))[-2:] == ["late", "later"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_column_that_nobody_needs_ends_no_stream(tmp_path: Path, kind: str, recwarn: pytest.WarningsRecorder) -> None:
    """Another one in one shard, another type in one; blank lines and rows without text are no documents."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    others: list[dict[str, object]] = [{"n": 1}, {"n": "two", "url": "u"}, {}]
    for shard, other in enumerate(others):
        rows = [{"text": f"shard {shard}, row {row}"} | other for row in range(20)]
        if kind == "jsonl":
            rows[3:3] = [{"n": 3}, {"text": None}] if shard else []
            (tmp_path / f"train-{shard}.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
        else:
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"train-{shard}.parquet")
    write_jsonl(tmp_path / "validation.jsonl", HELD_OUT)
    if kind == "parquet":
        (tmp_path / "validation.jsonl").unlink()
        pq.write_table(pa.table({"text": HELD_OUT}), tmp_path / "validation.parquet")
    seen = set(documents_of(read(build(dataset=str(tmp_path), streams=1), 2200 // (4 * T))))  # two epochs at least
    assert any("rows without a column 'text' are left out" in str(told) for told in recwarn) == (kind == "jsonl")
    assert seen >= {f"shard {shard}, row {row}" for shard in range(3) for row in range(20)}


def test_compressed_shards_are_read_to_their_end(tmp_path: Path) -> None:
    """Of several frames too, as tools that compress in parallel write them."""
    import pyarrow as pa

    lines = [json.dumps({"text": f"row {row}"}) + "\n" for row in range(40)]
    frames = [pa.compress("".join(lines[at : at + 10]).encode(), "zstd", asbytes=True) for at in range(0, 40, 10)]
    (tmp_path / "train-0.jsonl.zst").write_bytes(b"".join(frames))
    (tmp_path / "train-1.jsonl.gz").write_bytes(gzip.compress(b'{"text": "gzip"}\n') * 2)
    (tmp_path / "validation.jsonl.xz").write_bytes(lzma.compress(b'{"text": "held out"}\n'))
    training, held_out = open_splits(DataConfig(dataset=str(tmp_path)))
    assert list(training.texts(training.rows)) == [*(f"row {row}" for row in range(40)), "gzip", "gzip"]
    assert list(held_out.texts(held_out.rows)) == ["held out"]


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Twelve logical streams over five files of very different sizes; epochs end within a few steps."""
    folder = tmp_path_factory.mktemp("twelve")
    sizes = [3, 20, 1, 6, 30]
    for shard, size in enumerate(sizes):
        write_jsonl(folder / f"train-{shard}.jsonl", TRAIN[sum(sizes[:shard]) : sum(sizes[:shard]) + size])
    write_jsonl(folder / "validation.jsonl", HELD_OUT)
    return build(12, dataset=str(folder), streams=12)


def fresh(corpus: Corpus) -> LogicalStreams:
    """Another rank's streams of the same data set."""
    train = corpus.train
    assert isinstance(train, LogicalStreams)
    settings = {"streams": train.count, "text": train._text, "seq_len": T, "global_batch_size": 12}
    return LogicalStreams(train._open_stream, **settings)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([1, 2, 3, 4, 5, 6])), min_size=1, max_size=4))
def test_any_ranks_read_the_same_batches_and_go_on_at_any_step(twelve: Corpus, legs: list[tuple[int, int]]) -> None:
    """Each leg goes on from the places of the ranks before it, with another number of ranks, for some steps more."""
    whole, places, step = fresh(twelve), None, 0
    for steps, ranks in [*legs, (2, 3)]:
        streams = [fresh(twelve) for _ in range(ranks)]
        for one in streams if places is not None else []:
            one.seek(step, json.loads(json.dumps(places)))
        for _ in range(steps):
            shares = [one.sequences(step, *share(12, rank, ranks)).input_ids for rank, one in enumerate(streams)]
            assert torch.equal(torch.cat(shares), whole.sequences(step, 0, 12).input_ids), (step, ranks)
            step += 1
        places = join_positions([one.position() for one in streams]) if steps else places
        for one in streams:
            one.close()
    assert places is not None and len(places["places"]) == 12
    whole.close()


def stream_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "data-stream"}


def test_a_rank_of_many_streams_has_few_threads_and_few_files(folder: Path) -> None:
    """Sixty-four streams: eight threads, a file for each stream at most, and what has been read is bounded."""
    this, batch = psutil.Process(), 64
    before, threads = len(this.open_files()), stream_threads()
    corpus = build(batch, dataset=str(folder), streams=64)
    for step in range(3):
        corpus.train.sequences(step, 0, batch)
        assert len(stream_threads() - threads) == 8
        assert len(this.open_files()) - before <= 64
    corpus.train.close()  # type: ignore[attr-defined]
    gc.collect()
    assert len(this.open_files()) <= before + 1


def test_a_place_of_another_kind_is_refused(folder: Path) -> None:
    position = build(dataset=str(folder)).train.position()
    assert position is not None
    old = {"epoch": 0, "texts": 3, "tokens": 40, "rest": [1], "windows": 2}
    with pytest.raises(AnotherTextError, match=r"earlier version of loqt_scale, which read .* in another order"):
        build(dataset=str(folder)).train.seek(1, old)
    with pytest.raises(AnotherTextError, match="put the old files back"):
        build(dataset=str(folder)).train.seek(1, position | {"text": "5 files"})
    with pytest.raises(AnotherTextError, match=r"with 2 logical streams, .* are 4; write data\.streams: 2 to"):
        build(dataset=str(folder)).train.seek(1, position | {"streams": 2})
    with pytest.raises(ValueError, match="are not those of 4"):
        build(dataset=str(folder)).train.seek(1, position | {"places": {"0": {}}})
    with pytest.raises(ValueError, match="ends before row 4000"):
        moved = build(dataset=str(folder))
        moved.train.seek(1, position | {"places": {str(number): {"row": 4000} for number in range(4)}})
        moved.train.sequences(1, 0, 4)


@pytest.mark.parametrize(
    ("data", "batch", "said"),
    [
        ({"dataset": "x", "streams": 0}, 4, r"data\.streams is 0; write 1 to \d+, or null"),
        ({"files": ["x.txt"], "streams": 4}, 4, r"only a streamed data set .* write data\.streams: null"),
        (
            {"dataset": "x", "streams": 5},
            12,
            r"does not divide train\.global_batch_size 12; write one of 1, 2, 3",
        ),
        ({"dataset": "x", "streams": 24}, 12, r"data\.streams is 24, which does not divide"),
    ],
)
def test_numbers_of_streams_that_cannot_be_are_refused(data: dict[str, Any], batch: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RunConfig(data=DataConfig(**data), train=TrainConfig(global_batch_size=batch))


def test_fewer_documents_than_streams(tmp_path: Path) -> None:
    """One file of three documents: parts of it are empty, and every stream goes on to those that are not."""
    write_jsonl(tmp_path / "train.jsonl", TRAIN[:3])
    write_jsonl(tmp_path / "validation.jsonl", HELD_OUT)
    corpus = build(8, dataset=str(tmp_path))
    assert "8 logical streams over 1 file, each read by 8 streams" in corpus.description
    rows = torch.stack([corpus.train.sequences(step, 0, 8).input_ids for step in range(40)])
    for stream in range(8):
        assert set(documents_of(rows[:, stream])) == set(TRAIN[:3])


def test_bits_per_byte_do_not_depend_on_the_tokenizer(tmp_path: Path, cache_dir: str) -> None:
    """A text costs so many nats in all, in tokens of a byte and in longer ones; some characters have several bytes."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Straße number {number}, naïve señor, said so: {number}" for number in range(400)))
    each = {"files": [str(text)], "cache_dir": cache_dir, "eval_fraction": 0.5, "max_eval_sequences": 10**6}
    found = {}
    for tokenizer in ("bytes", "bpe"):
        corpus = build(tokenizer=tokenizer, bpe_vocab_size=300, seq_len=64, **each)
        tokens = int((corpus.eval.labels >= 0).sum())
        found[tokenizer] = corpus.bits_per_byte(1000.0 / tokens)
    documents = text.read_text().encode().split(b"\n\n")
    assert found["bytes"] == pytest.approx(found["bpe"], rel=0.02)
    assert 1000.0 / math.log(2) / found["bytes"] == pytest.approx(sum(map(len, documents)) / 2, rel=0.15)
