"""The token store: a split by content, built once, never stale."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loqt_scale.data import token_store
from loqt_scale.data.corpora import HeldInMemory, LocalText, files_text
from loqt_scale.data.token_store import (
    TokenStore,
    default_cache_dir,
    document_hash,
    holdout_threshold,
    tokenized,
    trained_bpe,
)
from loqt_scale.data.tokenizers import ByteTokenizer, train_bpe

DOCUMENTS = [f"document number {i} " + "x" * (i % 17) for i in range(200)]


def text_of(documents: list[str], key: str = "key") -> LocalText:
    return LocalText(name="a test", key=key, parts=[HeldInMemory(documents)])


class Generated(HeldInMemory):
    """Documents of a function that is called for each pass."""

    def __init__(self, documents: Callable[[], Iterator[str]]) -> None:
        super().__init__([])
        object.__setattr__(self, "documents", documents)


def documents_of(tokens: np.ndarray) -> list[str]:
    tokenizer = ByteTokenizer()
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
    assert ends[-1] == len(tokens) - 1
    return [tokenizer.decode(part.tolist()) for part in np.split(tokens, ends + 1)[:-1]]


def build(documents: list[str], cache_dir: Path, fraction: float = 0.2, key: str = "key") -> TokenStore:
    return tokenized(text_of(documents, key), ByteTokenizer(), eval_fraction=fraction, cache_dir=cache_dir)


def test_every_document_is_on_one_side_in_order(tmp_path: Path) -> None:
    made = build(DOCUMENTS, tmp_path)
    train, held_out = documents_of(made.train), documents_of(made.eval)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(DOCUMENTS)
    assert train == [d for d in DOCUMENTS if d in set(train)]
    assert 20 <= len(held_out) <= 60
    assert (made.train_documents, made.eval_documents) == (len(train), len(held_out))
    assert isinstance(made.train, np.memmap) and made.train.dtype == np.uint16


def test_split_depends_on_content_not_on_order_or_neighbours(tmp_path: Path) -> None:
    held_out = set(documents_of(build(DOCUMENTS, tmp_path).eval))
    moved = set(documents_of(build([*reversed(DOCUMENTS)], tmp_path, key="reversed").eval))
    grown = set(documents_of(build([*DOCUMENTS, "new one", DOCUMENTS[0]], tmp_path, key="grown").eval))
    assert moved == held_out
    assert grown - {"new one"} == held_out


@given(st.sets(st.text(st.characters(codec="utf-8"), min_size=1), min_size=2, max_size=6), st.floats(1e-9, 1 - 1e-9))
def test_each_side_gets_a_document(documents: set[str], fraction: float) -> None:
    threshold = holdout_threshold(text_of(list(documents)), fraction)
    sides = {document_hash(document) < threshold for document in documents}
    assert sides == {True, False}


def test_empty_and_single_document_corpora_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"corpus is empty: a test holds no text; write other data\.files"):
        build([], tmp_path)
    with pytest.raises(ValueError, match=r"corpus too small: a test holds one document.*data\.files"):
        build(["only", "only"], tmp_path)


def test_second_build_reads_the_cache(tmp_path: Path) -> None:
    def broken() -> Iterator[str]:
        raise AssertionError("read again")

    first = build(DOCUMENTS, tmp_path)
    text = LocalText(name="a test", key="key", parts=[Generated(broken)])
    again = tokenized(text, ByteTokenizer(), eval_fraction=0.2, cache_dir=tmp_path)
    assert (again.train == first.train).all() and (again.eval == first.eval).all()


def test_cache_is_keyed_by_text_tokenizer_and_fraction(tmp_path: Path) -> None:
    class Other(ByteTokenizer):
        fingerprint = "other"

    build(DOCUMENTS, tmp_path)
    build(DOCUMENTS, tmp_path, key="other text")
    build(DOCUMENTS, tmp_path, fraction=0.3)
    tokenized(text_of(DOCUMENTS), Other(), eval_fraction=0.2, cache_dir=tmp_path)
    assert len([path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]) == 4


def test_changed_file_is_tokenized_again(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for count in (10, 20):
        path.write_text("\n\n".join(DOCUMENTS[:count]))
        made = tokenized(files_text([str(path)], "text"), ByteTokenizer(), eval_fraction=0.2, cache_dir=tmp_path)
        assert made.train_documents + made.eval_documents == count


def test_a_file_of_the_same_size_and_age_with_other_content_is_tokenized_again(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    stores = []
    for word in ("one", "two"):
        path.write_text("\n\n".join(f"{document} {word}" for document in DOCUMENTS))
        os.utime(path, (10**9, 10**9))
        stores.append(
            tokenized(files_text([str(path)], "text"), ByteTokenizer(), eval_fraction=0.2, cache_dir=tmp_path)
        )
    assert stores[0].train_digest != stores[1].train_digest


def test_digests_are_those_of_the_content(tmp_path: Path) -> None:
    first, again = build(DOCUMENTS, tmp_path / "a"), build(DOCUMENTS, tmp_path / "b", key="another key")
    assert (first.train_digest, first.eval_digest) == (again.train_digest, again.eval_digest)
    assert build([*DOCUMENTS, *(f"more {i}" for i in range(9))], tmp_path / "c").train_digest != first.train_digest


def test_damaged_tokens_are_made_anew_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = build(DOCUMENTS, tmp_path)
    ids = first.train.tolist()
    (path,) = (tmp_path / "tokens").glob("*/train.npy")
    path.write_bytes(path.read_bytes()[:-2] + b"\x00\x00")
    assert build(DOCUMENTS, tmp_path).train.tolist() == ids
    assert "damaged (train.npy is not what was written); it is built anew" in capsys.readouterr().err


def test_interrupted_build_leaves_nothing_behind(tmp_path: Path) -> None:
    def failing() -> Iterator[str]:
        yield "one"
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        text = LocalText(name="", key="key", parts=[Generated(failing)])
        tokenized(text, ByteTokenizer(), eval_fraction=0.2, cache_dir=tmp_path)
    assert [path.suffix for path in (tmp_path / "tokens").iterdir()] in ([".lock"], [])
    assert build(DOCUMENTS, tmp_path).train_documents > 0


def test_large_vocabularies_are_stored_in_32_bits(tmp_path: Path) -> None:
    class Large(ByteTokenizer):
        vocab_size, eos_token_id, fingerprint = 2**16 + 64, 2**16 + 1, "large"

    made = tokenized(text_of(DOCUMENTS), Large(), eval_fraction=0.2, cache_dir=tmp_path)
    assert made.train.dtype == np.uint32 and made.train[-1] == 2**16 + 1


def test_unwritable_cache_says_what_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written: Not a directory.*write data\.cache_dir"):
        build(DOCUMENTS, tmp_path / "file")


def test_default_cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "loqt_scale"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "loqt_scale"


def test_bpe_sees_training_documents_only_and_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    real = train_bpe

    def spy(documents: Iterator[str], vocab_size: int, folder: Path) -> None:
        seen.append(list(documents))
        real(seen[-1], vocab_size, folder)

    monkeypatch.setattr(token_store, "train_bpe", spy)
    made = [trained_bpe(text_of(DOCUMENTS), vocab_size=300, eval_fraction=0.2, cache_dir=tmp_path) for _ in range(2)]
    assert made[0].fingerprint == made[1].fingerprint
    assert seen == [documents_of(build(DOCUMENTS, tmp_path).train)]


def _build_slowly(cache_dir: str, barrier: object, results: object) -> None:
    calls = 0

    def documents() -> Iterator[str]:
        nonlocal calls
        calls += 1
        return iter(DOCUMENTS)

    barrier.wait()  # type: ignore[attr-defined]
    text = LocalText(name="", key="key", parts=[Generated(documents)])
    made = tokenized(text, ByteTokenizer(), eval_fraction=0.2, cache_dir=Path(cache_dir))
    results.put((calls, made.train.tobytes()))  # type: ignore[attr-defined]


def test_concurrent_builders_build_once_and_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # spawn would import torch anew in each
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_build_slowly, args=(str(tmp_path), barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    answers = [results.get(timeout=20) for _ in workers]
    for worker in workers:
        worker.join(10)
    assert answers[0][1] == answers[1][1]
    assert sorted(calls for calls, _ in answers) == [0, 2]  # one process made both passes, the other none
