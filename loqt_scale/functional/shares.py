"""How ranks share out the sequences of a global batch, and in how many passes each takes its share."""

from __future__ import annotations


def share(sequences: int, rank: int, ranks: int) -> tuple[int, int]:
    """Sequences [start, stop) of a rank; shares differ by at most one."""
    return rank * sequences // ranks, (rank + 1) * sequences // ranks


def micro_steps(sequences: int, ranks: int, micro_batch_size: int) -> int:
    """Passes that every rank takes, each of at most `micro_batch_size` sequences: enough for the largest share."""
    largest = -(-sequences // ranks)
    return -(-largest // micro_batch_size)
