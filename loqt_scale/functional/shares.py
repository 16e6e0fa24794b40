"""How N ranks divide sequences, passes and rows among them. Two cuts, which differ where N does not divide the whole:

sequences of a batch    as even as can be: 7 over 3 ranks are 2, 2, 3      `share`
rows of a tensor        as torch.chunk and FSDP2 cut: 3, 3, 1              `shard_range`
"""

from __future__ import annotations


def share(sequences: int, rank: int, ranks: int) -> tuple[int, int]:
    """Sequences [start, stop) of a rank."""
    return rank * sequences // ranks, (rank + 1) * sequences // ranks


def micro_steps(sequences: int, ranks: int, micro_batch_size: int) -> int:
    """Passes that every rank takes, each of at most `micro_batch_size` sequences: enough for the largest share."""
    largest = -(-sequences // ranks)
    return -(-largest // micro_batch_size)


def shard_range(rows: int, rank: int, ranks: int) -> tuple[int, int]:
    """Rows [start, stop) of a rank when dim 0 is cut as `torch.chunk` (and FSDP2) cuts it."""
    chunk = -(-rows // ranks)
    return min(rank * chunk, rows), min((rank + 1) * chunk, rows)
