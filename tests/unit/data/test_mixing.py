"""Several texts by weight: shares, order, resuming; local files and streamed data sets together."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loqt_scale.config import DataConfig
from loqt_scale.config.sources import Shares, read_sources, shares_of
from loqt_scale.data import Corpus, build_corpus, join_positions
from loqt_scale.data.mixing import Mixing
from loqt_scale.errors import UserError
from loqt_scale.functional.shares import share
from loqt_scale.training.messages import mixing_notes

T, B = 8, 12
WEIGHTS = st.lists(st.floats(0.001, 1.0), min_size=1, max_size=6)


def mixing(weights: list[float], batch_size: int = B, seed: int = 0) -> Mixing:
    sums = list(itertools.accumulate(weights, initial=0.0))
    return Mixing([Shares(0, tuple(x / sums[-1] for x in sums))], seed=seed, global_batch_size=batch_size)


@given(WEIGHTS, st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 3000))
def test_every_step_holds_the_shares_to_one_sequence_and_all_steps_together_to_a_few(
    weights: list[float], batch_size: int, seed: int, steps: int
) -> None:
    made, wanted = mixing(weights, batch_size, seed), batch_size * np.array(weights) / sum(weights)
    read = made.before(steps)
    assert read.sum() == steps * batch_size
    assert (abs(read - steps * wanted) <= 3 + math.log2(steps + 1)).all()
    counts = np.bincount(made.texts(steps), minlength=len(weights))
    assert (abs(counts - wanted) < 1).all() and counts.sum() == batch_size
    assert (made.before(steps + 1) - read == counts).all()


def test_a_source_rarer_than_one_sequence_a_step_gets_its_share_in_every_place_of_the_batch() -> None:
    """A logical stream has fixed places: each must get its turn."""
    made = mixing([0.95, 0.05], batch_size=8)
    rare = sum((made.texts(step) == 1).astype(int) for step in range(2000))
    assert abs(rare.sum() - 2000 * 8 * 0.05) <= 10  # 800 of 16,000, 100 in each place
    assert (abs(rare - 100) < 50).all()


def test_shares_follow_weights_that_change() -> None:
    sources = read_sources(
        [
            {"name": "a", "files": ["a"], "weight": [{"from_step": 0, "weight": 3}, {"from_step": 100, "weight": 1}]},
            {"name": "b", "files": ["b"]},
            {"name": "c", "files": ["c"], "weight": [{"from_step": 0, "weight": 0}, {"from_step": 60, "weight": 2}]},
        ]
    )
    made = Mixing(shares_of(sources), seed=1, global_batch_size=B)
    parts = [made.before(step) for step in (0, 60, 100, 1100)]
    expected = ([0.75, 0.25, 0], [0.5, 1 / 6, 1 / 3], [0.25, 0.25, 0.5])
    for (before, after), steps, shares in zip(itertools.pairwise(parts), (60, 40, 1000), expected, strict=True):
        assert after - before == pytest.approx(steps * B * np.array(shares), abs=6)
    assert parts[1][2] == 0  # not one
    whole = sum(np.bincount(made.texts(step), minlength=3) for step in range(130))
    assert (whole == made.before(130)).all() and (made.before(60) == parts[1]).all()


def test_the_mixture_is_the_same_in_every_release() -> None:
    made = mixing([1, 2, 3], batch_size=8, seed=5)
    assert [made.texts(step).tolist() for step in (0, 10**6)] == GOLDEN
    assert made.before(10**6).tolist() == GOLDEN_SUM


GOLDEN = [[1, 2, 2, 0, 0, 2, 2, 1], [2, 2, 2, 2, 1, 1, 0, 0]]
GOLDEN_SUM = [1_333_333, 2_666_667, 4_000_000]


# ---- local files and streams ----------------------------------------------------------------------------------------


def jsonl(path: Path, rows: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files and a data set, each of letters of its own: the text of a sequence tells its source."""
    folder = tmp_path_factory.mktemp("texts")
    jsonl(folder / "a.jsonl", [f"{'a' * (9 + i % 5)}" for i in range(90)])
    jsonl(folder / "b.jsonl", [f"{'b' * (4 + i)}" for i in range(4)])
    (folder / "c").mkdir()
    for shard in range(3):
        jsonl(folder / "c" / f"train-{shard}.jsonl", ["c" * (5 + 2 * i + shard) for i in range(8)])
    jsonl(folder / "c" / "validation.jsonl", ["c" * 21])
    return folder


def sources(texts: Path) -> list[dict[str, Any]]:
    return [
        {"name": "a", "files": [str(texts / "a.jsonl")], "weight": 3},
        {"name": "b", "files": [str(texts / "b.jsonl")], "weight": [{"from_step": 0, "weight": 0.5}]},
        {
            "name": "c",
            "dataset": str(texts / "c"),
            "weight": [{"from_step": 0, "weight": 0.5}, {"from_step": 6, "weight": 4}],
        },
    ]


def build(texts: Path, streams: int | None = 6, **more: Any) -> Corpus:
    config = DataConfig(
        **{"seq_len": T, "cache_dir": str(texts / "cache"), "sources": sources(texts), "eval_fraction": 0.2}
        | more
        | {"streams": streams}
    )
    return build_corpus(config, seed=3, global_batch_size=B)


def read(corpus: Corpus, step: int, rank: int = 0, ranks: int = 1) -> list[str]:
    """A rank's sequences of a step as text, T + 1 tokens each."""
    batch = corpus.train.sequences(step, *share(B, rank, ranks))
    return [_decoded(row) for row in torch.cat([batch.input_ids, batch.labels[:, -1:]], dim=1)]


def _decoded(row: torch.Tensor) -> str:
    return "".join(chr(token) if token < 256 else "|" for token in row.tolist())


@pytest.fixture(scope="module")
def corpus(texts: Path) -> Corpus:
    return build(texts)


@pytest.fixture(scope="module")
def whole(corpus: Corpus) -> list[list[str]]:
    return [read(corpus, step) for step in range(14)]


def letters(rows: list[str]) -> list[str]:
    return [next(letter for letter in row if letter != "|") for row in rows]


def test_each_sequence_is_of_one_text_and_what_is_logged_is_what_was_read(
    corpus: Corpus, whole: list[list[str]]
) -> None:
    assert corpus.mixed is not None
    for rows in whole:
        assert all(set(row) <= {letter, "|"} for row, letter in zip(rows, letters(rows), strict=True))
    for step in (1, 6, 14):
        numbers = corpus.mixed.numbers(step)
        found = "".join("".join(letters(rows)) for rows in whole[:step])
        for name in "abc":
            assert numbers[f"data/{name}/tokens"] == T * found.count(name)
            assert numbers[f"data/{name}/share"] == pytest.approx(found.count(name) / (step * B))
    assert corpus.mixed.numbers(6)["data/c/weight"] == 0.125
    assert corpus.mixed.numbers(7)["data/c/weight"] == pytest.approx(4 / 7.5)
    assert corpus.mixed.numbers(14)["data/b/epochs"] > 4
    assert corpus.mixed.streamed == ["c"]
    once = sum(5 + 2 * i + shard + 1 for shard in range(3) for i in range(8))  # tokens of data set c
    assert corpus.mixed.numbers(14)["data/c/epochs"] == pytest.approx(numbers["data/c/tokens"] / once, abs=1)
    assert sorted(corpus.held_out) == ["a", "b", "c"] and corpus.streams == (6,)
    assert torch.equal(corpus.eval.labels, torch.cat([part.labels for part in corpus.held_out.values()]))


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 13), st.integers(1, 4), st.integers(1, 6))
def test_a_run_goes_on_exactly_at_any_step_on_any_number_of_ranks(
    texts: Path, whole: list[list[str]], step: int, ranks: int, other: int
) -> None:
    def corpora(count: int) -> list[Corpus]:
        return [build(texts) for _ in range(count)]

    def rows(built: list[Corpus], step: int) -> list[str]:
        return [row for rank, corpus in enumerate(built) for row in read(corpus, step, rank, len(built))]

    first = corpora(ranks)
    assert [rows(first, at) for at in range(step)] == whole[:step]
    rows(first, step)  # a checkpoint may be of the step before the last one that was read
    position = json.loads(json.dumps(join_positions([corpus.train.position(step) for corpus in first])))
    second = corpora(other)
    for corpus in second:
        corpus.train.seek(step, position)
    assert [rows(second, at) for at in range(step, 14)] == whole[step:]


def test_a_source_that_comes_later_does_not_change_what_was_before(texts: Path, whole: list[list[str]]) -> None:
    late = {
        "name": "d",
        "files": [str(texts / "b.jsonl")],
        "weight": [{"from_step": 0, "weight": 0}, {"from_step": 9, "weight": 50}],
    }
    position, corpus = build(texts).train.position(0), build(texts, sources=[late, *sources(texts)])
    assert [read(corpus, step) for step in range(9)] == whole[:9]
    assert letters(read(corpus, 9)).count("b") >= 9
    fresh = build(texts, sources=[late, *sources(texts)])
    fresh.train.seek(0, position or {})
    assert read(fresh, 8) == whole[8]
    with pytest.raises(UserError, match="'d': it has been read, but there is no place"):
        build(texts, sources=[late, *sources(texts)]).train.seek(12, position or {})


def test_errors_name_the_source(texts: Path) -> None:
    (texts / "tiny.txt").write_text("x\n\ny")
    tiny = {"name": "tiny", "files": [str(texts / "tiny.txt")]}
    with pytest.raises(UserError, match=r"data\.sources, 'tiny': corpus smaller than one sequence"):
        build(texts, sources=[*sources(texts), tiny])
    gone = {"name": "gone", "files": [str(texts / "gone.txt")]}
    with pytest.raises(FileNotFoundError, match=r"data\.sources, 'gone': .*gone\.txt does not exist"):
        build(texts, sources=[gone, *sources(texts)])
    position = build(texts).train.position(0) or {}
    position["sources"]["a"] = {"text": "another"}
    with pytest.raises(UserError, match=r"data\.sources, 'a': the training text is another one"):
        build(texts).train.seek(3, position)
    with pytest.raises(UserError, match="is no place in a, b, c"):
        build(texts).train.seek(3, {"text": "of a run without sources"})


def test_a_source_that_is_read_often_and_a_weight_that_never_comes_are_told(corpus: Corpus, texts: Path) -> None:
    def notes(steps: int) -> str:
        data = DataConfig(sources=sources(texts))
        return "\n".join(mixing_notes(corpus, data, steps=steps))

    assert "'b' is read 26.5 times" in notes(60) and "write a smaller weight" in notes(60)
    assert "'c'" not in notes(60)
    assert "'c': its weight changes when 6 steps are done, and this run has 5" in notes(5)
    assert "'b'" not in notes(5)


def test_a_run_says_which_shares_it_will_have(corpus: Corpus, texts: Path) -> None:
    lines = [line.strip() for line in corpus.description.splitlines()]
    assert lines[0] == "3 sources, shares of tokens at step 0" and lines[1].startswith("a (75.00%): ")
    assert lines[4:] == ["after step 6: a 40.00%, b 6.67%, c 53.33%"]
    often = sources(texts)
    often[0]["weight"] = [{"from_step": 10 * k, "weight": k + 1} for k in range(9)]
    assert build(texts, sources=often).description.endswith("and 5 changes more, the last after step 80")


def test_bpe_is_trained_on_all_local_texts(texts: Path) -> None:
    corpus = build(texts, streams=None, sources=sources(texts)[:2], tokenizer="bpe", bpe_vocab_size=300, seq_len=2)
    ids = corpus.tokenizer.encode_batch(["aaaaaaaa", "bbbb", "zzzz"])
    assert len(ids[0]) < 8 and len(ids[1]) < 4 and len(ids[2]) == 4
    assert corpus.streams == () and corpus.occurring() <= corpus.tokenizer.vocab_size
