"""One attempt's ranks finding each other in a store that still holds what killed attempts left in it.

`torchrun --max-restarts` starts new ranks, but its agent keeps one key-value store for all attempts, and torch does not
tell their keys apart: a new rank may read the address of a dead one ("Connection refused", or a wait for ever). The
restart count is no remedy, agents on several nodes count their own restarts only. So the ranks agree on a fresh prefix:

    rank r > 0   writes a random word to hello/r; waits for a welcome with that word in it; answers with welcome's key
    rank 0       writes a welcome (a random key, the word read from each rank) until all have answered with its key

Nothing stale is ever taken: an old welcome lacks r's new word, an old answer rank 0's new key.
"""

from __future__ import annotations

import json
import secrets
import time
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store

_POLL_SECONDS = 0.02


def fresh_store(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """A view of the store that only the ranks of this attempt share. Every rank.

    Args:
        store: What all ranks see; may hold keys of earlier attempts.
        rank: This rank.
        world_size: Ranks.
        timeout: How long to wait for the others.

    Raises:
        TimeoutError: Some rank did not come; the message says which (on rank 0).
    """
    deadline = time.monotonic() + timeout.total_seconds()
    word = secrets.token_hex(8)
    key = _welcome(store, world_size, word, deadline) if rank == 0 else _ask(store, rank, word, deadline)
    return PrefixStore(f"attempt-{key}", store)


def _welcome(store: Store, world_size: int, key: str, deadline: float) -> str:
    others = range(1, world_size)
    while missing := [rank for rank in others if _read(store, f"answer/{rank}") != key]:
        words = {rank: _read(store, f"hello/{rank}") for rank in others}
        store.set("welcome", json.dumps({"key": key, "words": words}))
        _wait(deadline, f"rank(s) {', '.join(map(str, missing))}")
    return key


def _ask(store: Store, rank: int, word: str, deadline: float) -> str:
    store.set(f"hello/{rank}", word)
    while True:
        welcome = json.loads(_read(store, "welcome") or "{}")
        if welcome.get("words", {}).get(str(rank)) == word:
            store.set(f"answer/{rank}", welcome["key"])
            return str(welcome["key"])
        _wait(deadline, "rank 0")


def _read(store: Store, key: str) -> str:
    return str(store.get(key).decode()) if store.check([key]) else ""


def _wait(deadline: float, whom: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"{whom} did not join; see the first error in the job's output for why")
    time.sleep(_POLL_SECONDS)
