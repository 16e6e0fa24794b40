"""Cutting a global batch into ranks' shares and micro-batches, so that the result does not depend on how it is cut.

Rank i takes sequences [i G / N, (i+1) G / N) of the step's G sequences: shares differ by at most one. Every rank runs
the same number of micro-steps, since each is a round of collectives; a rank that has run out of sequences runs one
sequence whose labels are all ignored: it adds nothing to loss or gradient. Losses are sums over tokens divided by the
step's token count, so unequal shares weigh by tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from loqt_scale.data import Batch

IGNORED = -100  # label of a position that does not count (PyTorch's convention)


def share(sequences: int, rank: int, world_size: int) -> tuple[int, int]:
    """Sequences [start, stop) of a rank."""
    return rank * sequences // world_size, (rank + 1) * sequences // world_size


def micro_steps(sequences: int, world_size: int, micro_batch_size: int) -> int:
    """Micro-steps that every rank runs: enough for the largest share."""
    largest = -(-sequences // world_size)
    return -(-largest // micro_batch_size)


def micro_batches(batch: Batch, *, steps: int, micro_batch_size: int, device: torch.device) -> Iterator[Batch]:
    """Cuts a rank's share into exactly `steps` micro-batches of at most `micro_batch_size` sequences."""
    for index in range(steps):
        rows = slice(index * micro_batch_size, (index + 1) * micro_batch_size)
        input_ids, labels = batch.input_ids[rows], batch.labels[rows]
        if input_ids.shape[0] == 0:
            length = batch.input_ids.shape[1]
            input_ids = torch.zeros(1, length, dtype=torch.int64)
            labels = torch.full((1, length), IGNORED, dtype=torch.int64)
        yield Batch(_send(input_ids, device), _send(labels, device))


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device; the host does not wait, for which its memory must be pinned."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def summed_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum of the cross-entropies of all counted positions in nats, float32 scalar; labels are already shifted."""
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")


def counted_tokens(labels_BT: Tensor) -> int:
    """Positions that count."""
    return int((labels_BT != IGNORED).sum())
