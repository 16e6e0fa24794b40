"""Documents to fixed-length sequences: concatenate, then cut.

A language model reads rectangles, text comes in ragged documents. Padding every document to one length would waste most
of the compute, so documents are laid end to end, an end-of-text token after each, and the resulting stream is cut every
T tokens:

    stream      d0 d0 d0 E  d1 d1 E  d2 d2 d2 d2 E ...          E = end of text
    window i    tokens [i T, (i+1) T]                           T + 1 tokens, the last one shared with window i + 1
    inputs      tokens [i T, (i+1) T)
    labels      tokens [i T + 1, (i+1) T + 1)                   the token after each input

Stride T and length T + 1 together mean that every token but the very first is predicted exactly once. Training drops
the incomplete window at the end; evaluation keeps it, padded with labels that are not counted, so that a held-out loss
is the mean over every held-out token.

Where documents are not to see one another (`data.mask_documents`), the model finds their borders by E.

Everything here is pure: no files, no state. T = seq_len, N = windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from loqt_scale.errors import UserError

IGNORED_LABEL = -100
"""The label torch's cross-entropy leaves out by default."""

Tokens = npt.NDArray[np.integer]
Int64Array = npt.NDArray[np.int64]


def join_documents(documents: Iterable[Sequence[int]], eos_token_id: int) -> Int64Array:
    """Concatenate token ids, an end-of-text token after each document.

    Args:
        documents: Token ids of each document.
        eos_token_id: Appended to every document.

    Returns:
        (n,) int64, n = the documents' lengths + one each.
    """
    joined: list[int] = []
    for ids in documents:
        joined.extend(ids)
        joined.append(eos_token_id)
    return np.array(joined, dtype=np.int64)


def text_groups(documents: Iterable[str], max_chars: int) -> Iterator[list[str]]:
    """Group documents so that each group is tokenized in one call.

    Args:
        documents: Any number of texts.
        max_chars: A group ends with the document that brings it to this many characters.

    Yields:
        Non-empty lists: the documents, in order.
    """
    group: list[str] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document)
        if size >= max_chars:
            yield group
            group, size = [], 0
    if group:
        yield group


def complete_windows(token_count: int, seq_len: int) -> int:
    """Return how many windows of T + 1 tokens and stride T fit into `token_count` tokens."""
    return max(0, (token_count - 1) // seq_len)


def windows_at(tokens: Tokens, indices: Int64Array, seq_len: int) -> Int64Array:
    """Gather complete windows by index.

    Args:
        tokens: (n,) token stream of any integer dtype; may be a memory map, only the windows asked for are read.
        indices: (N,) int64 window numbers, each below `complete_windows(n, seq_len)`.
        seq_len: T.

    Returns:
        (N, T + 1) int64; row j holds tokens [indices[j] T, indices[j] T + T].
    """
    offsets = np.arange(seq_len + 1, dtype=np.int64)
    return np.asarray(tokens[indices[:, None] * seq_len + offsets], dtype=np.int64)


def evaluation_windows(tokens: Tokens, seq_len: int, max_windows: int, pad_id: int) -> tuple[Int64Array, Int64Array]:
    """Cut a held-out stream so that every token counts once, and keep at most `max_windows` windows of it.

    When there are too many, evenly spaced ones are kept: the beginning of a corpus is rarely like the rest of it.

    Args:
        tokens: (n,) held-out stream, n >= 2 (the first token has nothing to be predicted from).
        seq_len: T.
        max_windows: Upper bound of N.
        pad_id: Input id in the padding of the last window; its labels are `IGNORED_LABEL`.

    Returns:
        inputs and labels, each (N, T) int64.

    Raises:
        ValueError: n < 2, so nothing can be predicted.
    """
    predicted = len(tokens) - 1
    if predicted < 1:
        raise UserError(f"a held-out stream of {len(tokens)} tokens predicts nothing; it needs 2 or more")
    total = -(-predicted // seq_len)
    kept = np.unique(np.linspace(0, total - 1, num=min(total, max_windows)).round().astype(np.int64))
    inputs = np.full((len(kept), seq_len), pad_id, dtype=np.int64)
    labels = np.full((len(kept), seq_len), IGNORED_LABEL, dtype=np.int64)
    for row, window in enumerate(kept):
        chunk = tokens[window * seq_len : (window + 1) * seq_len + 1]
        inputs[row, : len(chunk) - 1] = chunk[:-1]
        labels[row, : len(chunk) - 1] = chunk[1:]
    return inputs, labels


def cut_windows(tokens: Int64Array, seq_len: int) -> tuple[Int64Array, Int64Array]:
    """Cut the complete windows off the front of a stream.

    Args:
        tokens: (n,) int64: what the last cut left, and what has come since.
        seq_len: T.

    Returns:
        (m, T + 1) int64, m >= 0, and the rest of the stream. The last token of a window is the first input of the next
        one, so it is in both.
    """
    complete = complete_windows(len(tokens), seq_len)
    return windows_at(tokens, np.arange(complete, dtype=np.int64), seq_len), tokens[complete * seq_len :]
