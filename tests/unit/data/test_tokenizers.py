"""Tokenizers: round trips, what they save, and what a name that cannot be loaded says."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loqt_scale.data.tokenizers import ByteTokenizer, check_ids, load_tokenizer, train_bpe
from loqt_scale.errors import UserError

TEXTS = ["Hello,  world!\n\n\ttabs", "naïve café — ÆØÅ 日本語 🙂", " leading and trailing ", "\x00\x7f\r\n", "a"]


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    train_bpe(["the cat sat on the mat, the cat sat"] * 50, 300, folder)
    return folder


def whitespace_tokenizer(folder: Path, **special: str) -> Path:
    backend = Backend(models.WordLevel({"[UNK]": 0, "<s>": 1, "</s>": 2, "hello": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special).save_pretrained(folder)
    return folder


@given(st.text(st.characters(codec="utf-8")))
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    (ids,) = tokenizer.encode_batch([text])
    assert ids == list(text.encode())
    assert tokenizer.decode([*ids, tokenizer.eos_token_id, 319]) == text


def test_byte_vocabulary_is_padded_to_a_multiple_of_64() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size % 64 == 0 and tokenizer.vocab_size > tokenizer.eos_token_id == 256


def test_lone_surrogates_do_not_stop_it() -> None:
    assert ByteTokenizer().encode_batch(["a\ud800b"]) == [[97, 63, 98]]


def test_saved_byte_tokenizer_is_the_same_to_transformers(tmp_path: Path) -> None:
    ours = ByteTokenizer()
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == ours.encode_batch([text])[0]
        assert theirs.decode(ids) == ours.decode(ids) == text
    assert theirs.eos_token_id == ours.eos_token_id
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.vocab_size == ours.vocab_size
    assert loaded.encode_batch(TEXTS) == ours.encode_batch(TEXTS)


def test_bpe_learns_merges_and_round_trips(bpe_folder: Path) -> None:
    tokenizer = load_tokenizer(str(bpe_folder), label="bpe")
    encoded = tokenizer.encode_batch(TEXTS)
    assert [tokenizer.decode(ids) for ids in encoded] == TEXTS
    assert len(tokenizer.encode_batch(["the cat sat"])[0]) < 6
    assert tokenizer.name == "bpe"
    assert tokenizer.vocab_size == 320  # 300 rounded up
    assert tokenizer.encode_batch([]) == []


def test_bpe_adds_no_special_tokens_and_has_an_end_of_text(bpe_folder: Path) -> None:
    tokenizer = load_tokenizer(str(bpe_folder))
    assert tokenizer.eos_token_id not in {i for ids in tokenizer.encode_batch(TEXTS) for i in ids}
    assert tokenizer.decode([tokenizer.eos_token_id]) == ""


def test_training_twice_gives_the_same_tokenizer(bpe_folder: Path, tmp_path: Path) -> None:
    train_bpe(["the cat sat on the mat, the cat sat"] * 50, 300, tmp_path)
    assert load_tokenizer(str(tmp_path)).fingerprint == load_tokenizer(str(bpe_folder)).fingerprint


def test_save_and_load_keep_ids_and_fingerprint(bpe_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(bpe_folder))
    tokenizer.save(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert (again.fingerprint, again.eos_token_id) == (tokenizer.fingerprint, tokenizer.eos_token_id)


def test_other_ids_than_a_pretrained_models_are_refused(bpe_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"data.tokenizer is bytes, whose ids .*; write data.tokenizer: {bpe_folder}"):
        check_ids(ByteTokenizer(), str(bpe_folder))
    check_ids(load_tokenizer(str(bpe_folder)), str(bpe_folder))
    check_ids(ByteTokenizer(), str(tmp_path))  # no tokenizer there
    ByteTokenizer().save(tmp_path)
    check_ids(ByteTokenizer(), str(tmp_path))


def test_any_saved_tokenizer_loads(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(whitespace_tokenizer(tmp_path, bos_token="<s>", eos_token="</s>")))
    assert tokenizer.encode_batch(["hello hello", "x"]) == [[3, 3], [0]]
    assert tokenizer.eos_token_id == 2 and tokenizer.vocab_size == 64


def test_beginning_of_text_stands_in_for_a_missing_end(tmp_path: Path) -> None:
    assert load_tokenizer(str(whitespace_tokenizer(tmp_path, bos_token="<s>"))).eos_token_id == 1


def test_tokenizer_without_either_is_refused(tmp_path: Path) -> None:
    folder = whitespace_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"neither an eos nor a bos token.*data\.tokenizer"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("name", ["./nope", "~/no-such-folder-here", "/nope/tokenizer", "a/b/c"])
def test_unknown_folder_is_named(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"tokenizer folder {name} does not exist.*data\.tokenizer"):
        load_tokenizer(name)


def test_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"AutoTokenizer cannot load {tmp_path}: .*data\.tokenizer"):
        load_tokenizer(str(tmp_path))


def test_unknown_id_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, **options: object) -> None:
        raise OSError("no connection\nand a long explanation")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(
        ValueError, match=r"cannot load some/model: no connection and a long explanation; write bytes, bpe"
    ):
        load_tokenizer("some/model")
