"""Ranks of one attempt find each other, whatever earlier attempts left in the store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from loqt_scale.strategies.rendezvous import fresh_store


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_every_attempt_has_keys_of_its_own(ranks: int) -> None:
    """Attempts after one another on one server, as an agent's restarts are; some die before all have joined."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ThreadPoolExecutor(ranks) as pool:
        for attempt in range(4):
            if attempt == 2 and ranks > 1:  # rank 0 never came
                with pytest.raises(TimeoutError, match="rank 0 did not join"):
                    fresh_store(client(server), 1, ranks, timedelta(seconds=0.1))
            if attempt == 3 and ranks > 1:  # all but rank 1 came
                with pytest.raises(TimeoutError, match=r"rank\(s\) 1"):
                    fresh_store(client(server), 0, ranks, timedelta(seconds=0.1))
            stores = list(
                pool.map(lambda r: fresh_store(client(server), r, ranks, timedelta(seconds=20)), range(ranks))
            )
            assert not stores[-1].check(["address"])
            stores[0].set("address", str(attempt))
            assert all(store.get("address").decode() == str(attempt) for store in stores)


def client(server: TCPStore) -> TCPStore:
    return TCPStore("127.0.0.1", server.port, is_master=False)
