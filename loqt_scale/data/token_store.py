"""Local corpora, tokenized once and kept on disk.

Tokenizing a corpus at every start, on every rank, would waste minutes; so the ids are written once, as two .npy files
(train and eval) that ranks map into memory and share through the page cache:

    cache_dir/tokenizers/KEY/   a trained BPE
    cache_dir/tokens/KEY/       train.npy, eval.npy, corpus.json

KEY is a hash of all that shapes the content, so a stale entry is never read and deleting the folder is always safe. How
an entry is built once and found whole is in `cache`.

*Held out* is decided by each document's content: a document whose 64-bit hash is in the lowest `eval_fraction` of the
hashes is for evaluation. So the split does not depend on the order of files, and two copies of one document always fall
on the same side.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loqt_scale.data.cache import built_once, digests
from loqt_scale.data.corpora import LocalText
from loqt_scale.data.packing import Tokens
from loqt_scale.data.tokenizers import Tokenizer, load_tokenizer, train_bpe
from loqt_scale.data.tokenizing import Encoder, document_hash, write_tokens
from loqt_scale.errors import UserError
from loqt_scale.process.environment import cache_home

_FORMAT_VERSION = 2  # raise it when the files or the way they are made change
_HASHES = 2**64


@dataclass(frozen=True, kw_only=True)
class TokenStore:
    """A tokenized corpus.

    Args:
        train: (n,) uint16 or uint32, read-only memory map: training documents, an end-of-text token after each.
        eval: (m,) likewise: the held-out documents. No document is in both.
        train_documents: Number of documents in `train`.
        eval_documents: Number of documents in `eval`.
        train_digest: Of the content of `train`: the same on every machine that has made it of the same text.
        eval_digest: Of the content of `eval`.
    """

    train: Tokens
    eval: Tokens
    train_documents: int
    eval_documents: int
    train_digest: str
    eval_digest: str


def default_cache_dir() -> Path:
    """Return $XDG_CACHE_HOME/loqt_scale, or ~/.cache/loqt_scale."""
    return cache_home() / "loqt_scale"


def holdout_threshold(text: LocalText, eval_fraction: float) -> int:
    """Choose the hash below which a document is held out.

    It is `eval_fraction` of the range of hashes, moved just enough that each side gets a document.

    Raises:
        ValueError: The corpus is empty, or holds fewer than two different documents.
    """
    lowest, highest, wanted = _HASHES, -1, int(eval_fraction * _HASHES)
    for document in text.documents():
        value = document_hash(document)
        lowest, highest = min(lowest, value), max(highest, value)
        if lowest < wanted <= highest:
            return wanted  # after a few documents; the rest would not move it
    if highest < 0:
        raise UserError(f"corpus is empty: {text.name} holds no text; write other data.files")
    if lowest == highest:
        raise UserError(
            f"corpus too small: {text.name} holds one document, and both training and evaluation need one; write more "
            "data.files (in .txt files, blank lines part documents)"
        )
    return min(max(wanted, lowest + 1), highest)


def trained_bpe(text: LocalText, *, vocab_size: int, eval_fraction: float, cache_dir: Path) -> Tokenizer:
    """Return the BPE tokenizer of a corpus' training documents, training it if the cache lacks it.

    Args:
        text: The corpus.
        vocab_size: Tokens to learn; the tokenizer's `vocab_size` is what was learnt, rounded up.
        eval_fraction: Share of documents held out, which are not trained on.
        cache_dir: Folder of the cache.
    """
    key = _key("bpe", text.key, vocab_size, eval_fraction)

    def build(folder: Path) -> None:
        threshold = holdout_threshold(text, eval_fraction)
        training = (document for document in text.documents() if document_hash(document) >= threshold)
        train_bpe(training, vocab_size, folder)

    what = f"training a BPE tokenizer on {text.name}"
    return load_tokenizer(str(built_once(cache_dir / "tokenizers" / key, build, what=what)), label="bpe")


def tokenized(text: LocalText, tokenizer: Tokenizer, *, eval_fraction: float, cache_dir: Path) -> TokenStore:
    """Return a corpus' tokens, tokenizing it if the cache lacks them.

    Args:
        text: The corpus.
        tokenizer: Gives the ids and the token after each document.
        eval_fraction: Share of documents held out.
        cache_dir: Folder of the cache.

    Raises:
        ValueError: The corpus is empty or too small to split, or `cache_dir` cannot be written.
    """
    key = _key("tokens", text.key, tokenizer.fingerprint, eval_fraction)
    folder = built_once(
        cache_dir / "tokens" / key,
        lambda folder: _write_entry(folder, text, tokenizer, eval_fraction),
        what=f"tokenizing {text.name}",
        goes_on=True,
    )
    known = digests(folder)
    facts = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    return TokenStore(
        train=_mapped(folder / "train.npy"),
        eval=_mapped(folder / "eval.npy"),
        train_documents=facts["train_documents"],
        eval_documents=facts["eval_documents"],
        train_digest=known["train.npy"],
        eval_digest=known["eval.npy"],
    )


def _key(*facts: object) -> str:
    return hashlib.blake2b(json.dumps([_FORMAT_VERSION, *facts]).encode(), digest_size=16).hexdigest()


def _write_entry(folder: Path, text: LocalText, tokenizer: Tokenizer, eval_fraction: float) -> None:
    encoder = Encoder(tokenizer=tokenizer, threshold=holdout_threshold(text, eval_fraction))
    written = write_tokens(folder, text, encoder)
    facts = {f"{side}_documents": of.documents for side, of in written.items()}
    (folder / "corpus.json").write_text(json.dumps(facts | {"source": text.name}), encoding="utf-8")


def _mapped(path: Path) -> Tokens:
    mapped: npt.NDArray[np.integer] = np.load(path, mmap_mode="r")
    return mapped
