"""Text to token ids and back, behind one small protocol.

Three tokenizers, picked by `data.tokenizer`:

* bytes   one token a byte, nothing to train or download: the default, and the fair choice for small comparisons, since
          a loss per byte does not depend on a vocabulary;
* bpe     byte-level BPE (GPT-2's kind) trained on the training documents of a local corpus;
* else    whatever `AutoTokenizer` loads from a folder or a Hugging Face id.

None adds special tokens when encoding: `packing.py` puts the end-of-text token after each document. `vocab_size` is the
number of rows an embedding needs, rounded up to a multiple of 64, which matrix units like and which shards evenly; ids
past the tokenizer's own are never produced. `save` writes files that `AutoTokenizer.from_pretrained` loads, so that an
exported model is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from loqt_scale.errors import MissingFileError, UserError, explained

VOCAB_MULTIPLE = 64
END_OF_TEXT = "<|endoftext|>"

_BYTE_EOS = 256
_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
_PROBE = "The first 10 words: naïve Bayes,\n\tdef f(x): return x**2  # 漢字"
_BPE_TRAINING_CHARS = 64_000_000  # merges hardly change after that, and training time grows with it


class Tokenizer(Protocol):
    """What the rest of the package needs of a tokenizer."""

    @property
    def name(self) -> str:
        """For people, e.g. "bytes"."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the ids of some text would; part of the key of cached tokens."""

    @property
    def vocab_size(self) -> int:
        """Rows of an embedding for it: above every id, and a multiple of `VOCAB_MULTIPLE`."""

    @property
    def token_count(self) -> int:
        """One more than the greatest id."""

    @property
    def eos_token_id(self) -> int:
        """Follows every document."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special tokens and padding of the vocabulary are left out."""

    def save(self, folder: Path) -> None:
        """Write files that `AutoTokenizer.from_pretrained(folder)` loads, with the same ids."""


class ByteTokenizer:
    """One token a byte of UTF-8: ids 0 to 255, end of text 256; `vocab_size` 320 (257 rounded up)."""

    name = "bytes"
    fingerprint = "bytes-1"
    vocab_size = 320
    token_count = _BYTE_EOS + 1
    eos_token_id = _BYTE_EOS

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        # Text from the wild can hold lone surrogates, which UTF-8 has no bytes for.
        return [list(text.encode("utf-8", "replace")) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < _BYTE_EOS).decode("utf-8", "replace")

    def save(self, folder: Path) -> None:
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend

        # A byte-level BPE without merges is a byte tokenizer, if each byte's stand-in character has the byte as its id.
        vocab = {character: byte for byte, character in _byte_characters().items()}
        backend = Backend(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
        _wrap(backend).save_pretrained(str(folder))


class HuggingFaceTokenizer:
    """Any tokenizer of the `transformers` library.

    Args:
        tokenizer: What `AutoTokenizer` returned.
        name: For people and for errors.

    Raises:
        ValueError: It has neither an end-of-text nor a beginning-of-text token to part documents with.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        # Some tokenizers (BERT's kin) have no end of text; a beginning of text parts documents as well.
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
        if eos is None:
            raise UserError(
                f"the tokenizer {name} has neither an eos nor a bos token, so documents cannot be told apart; "
                "set one in its tokenizer_config.json, or write another data.tokenizer"
            )
        ids = tokenizer.get_vocab().values()
        self.name = name
        self.eos_token_id: int = int(eos)
        self.token_count = max(len(tokenizer), max(ids) + 1, self.eos_token_id + 1)
        self.vocab_size = _round_up(self.token_count)
        self.fingerprint = _fingerprint(tokenizer, self.eos_token_id)
        self._tokenizer = tokenizer

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # it would warn that documents are longer than the model's context; we cut them ourselves
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str:
        known = len(self._tokenizer)
        text = self._tokenizer.decode(
            [int(i) for i in ids if i < known], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def save(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(str(folder))


def load_tokenizer(name: str, *, label: str | None = None) -> Tokenizer:
    """Return the tokenizer `data.tokenizer` names, other than `bpe` (which has to be trained first).

    Args:
        name: "bytes", a folder, or a Hugging Face id.
        label: The tokenizer's `name`, if not `name`.

    Raises:
        FileNotFoundError: `name` looks like a path and there is no such folder.
        ValueError: `AutoTokenizer` cannot load it, or it has no token to part documents with.
    """
    if name == "bytes":
        return ByteTokenizer()
    folder = Path(name).expanduser()
    advice = "write bytes, bpe, a folder with tokenizer files, or a Hugging Face id in data.tokenizer"
    looks_like_path = name.startswith((".", "~", "/")) or folder.is_absolute() or name.count("/") > 1
    if looks_like_path and not folder.is_dir():
        raise MissingFileError(f"the tokenizer folder {name} does not exist; {advice}")
    from transformers import AutoTokenizer  # takes seconds to import, which the byte tokenizer need not pay

    with explained(f"AutoTokenizer cannot load {name}", advice):  # OSError, ValueError, KeyError, whatever is missing
        loaded = AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else name, trust_remote_code=False, local_files_only=folder.is_dir()
        )
        return HuggingFaceTokenizer(loaded, label or name)


def check_ids(tokenizer: Tokenizer, model: str) -> None:
    """Refuses a tokenizer whose ids mean other tokens than a pretrained model's embeddings.

    Args:
        tokenizer: What the text is encoded with.
        model: The model's folder or Hugging Face id. One without a tokenizer that can be read is let through.

    Raises:
        ValueError: The model's own tokenizer gives other ids.
    """
    own = _tokenizer_of(model)
    if own is not None and own.encode_batch([_PROBE]) != tokenizer.encode_batch([_PROBE]):
        raise UserError(
            f"data.tokenizer is {tokenizer.name}, whose ids stand for other tokens than the pretrained embeddings of "
            f"model.path; write data.tokenizer: {model}"
        )


def _tokenizer_of(model: str) -> Tokenizer | None:
    folder = Path(model)
    if folder.is_dir() and not any((folder / name).is_file() for name in _FILES):
        return None
    try:
        return load_tokenizer(model)
    except UserError:
        return None


def train_bpe(documents: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE and save it for `load_tokenizer(folder)`.

    Args:
        documents: Training documents only (a held-out text must not shape the vocabulary). At most the first 64 million
            characters are read.
        vocab_size: Tokens to learn, 256 bytes and the end of text included. A small corpus may yield fewer.
        folder: Where the files go; made if needed.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, so that no text is unknown
        show_progress=False,
    )
    backend.train_from_iterator(_first_chars(documents, _BPE_TRAINING_CHARS), trainer)
    _wrap(backend).save_pretrained(str(folder))


def _first_chars(documents: Iterable[str], limit: int) -> Iterator[str]:
    seen = 0
    for document in documents:
        if seen >= limit:
            return
        seen += len(document)
        # The Rust side takes valid Unicode only.
        yield document.encode("utf-8", "replace").decode("utf-8")


def _wrap(backend: Any) -> Any:
    import transformers

    fast: Any = transformers.PreTrainedTokenizerFast  # its constructor is untyped
    return fast(tokenizer_object=backend, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False)


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself if it prints, else the next character from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + rank) for rank, byte in enumerate(others)}


def _fingerprint(tokenizer: Any, eos_token_id: int) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = str(backend.to_str())
    else:  # a Python tokenizer: its class and vocabulary are what can be seen from outside
        state = type(tokenizer).__qualname__ + json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.blake2b(f"{eos_token_id}\0{state}".encode("utf-8", "replace"), digest_size=16).hexdigest()


def _round_up(count: int) -> int:
    return -(-count // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
