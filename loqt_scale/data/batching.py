"""A rank's share of a batch as micro-batches, and their losses, so that the result does not depend on how it is cut.

Every rank takes the same number of passes, since each is a round of collectives. A rank that has run out of sequences
takes one whose labels are all ignored: it adds nothing to loss or gradient. Losses are sums over tokens, divided by the
step's token count, so unequal shares weigh by tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from loqt_scale.data.batches import Batch
from loqt_scale.data.packing import IGNORED_LABEL
from loqt_scale.data.tokenizers import Tokenizer


def micro_batches(batch: Batch, *, steps: int, micro_batch_size: int, device: torch.device) -> Iterator[Batch]:
    """Cuts a rank's share into exactly `steps` micro-batches of at most `micro_batch_size` sequences."""
    for index in range(steps):
        rows = slice(index * micro_batch_size, (index + 1) * micro_batch_size)
        input_ids, labels = batch.input_ids[rows], batch.labels[rows]
        if input_ids.shape[0] == 0:
            length = batch.input_ids.shape[1]
            input_ids = torch.zeros(1, length, dtype=torch.int64)
            labels = torch.full((1, length), IGNORED_LABEL, dtype=torch.int64)
        yield Batch(_send(input_ids, device), _send(labels, device))


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device; the host does not wait, for which its memory must be pinned."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def summed_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum of the cross-entropies of all counted positions in nats, float32 scalar; labels are already shifted."""
    logits, labels = logits_BTV.flatten(0, 1).float(), labels_BT.flatten()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")


def counted_tokens(labels_BT: Tensor) -> int:
    """Positions that count."""
    return int((labels_BT != IGNORED_LABEL).sum())


def counted_bytes(labels_BT: Tensor, tokenizer: Tokenizer) -> int:
    """Bytes of UTF-8 that the counted positions stand for; of ends of documents none.

    A sequence may begin or end inside of a character, which then counts as if it were whole.
    """
    ids = labels_BT[labels_BT != IGNORED_LABEL].tolist()
    return len(tokenizer.decode(ids).encode("utf-8", "replace"))
