"""How a job's ranks find each other: through a key-value store, the launcher's or rank 0's.

`torchrun --max-restarts` starts new ranks after a failure, but its agent keeps one store for all attempts, and torch
does not keep the attempts' keys apart. A new rank may read the address of a dead one, and fail or wait for ever. The
number of the restart is no remedy: on several nodes each agent counts only its own. So the ranks of an attempt agree on
a fresh prefix for their keys. Each draws a random word; rank 0's is the key:

    rank 0 (key K)                                store                       rank r (word W_r)
                                                  hello/r = W_r        <----  writes its word
    reads the words of all ranks            <---- hello/1 ... hello/N-1
    writes the key and the words it read    ----> welcome = K, {r: W_r}
                                                  welcome              ---->  finds W_r in it: this welcome is new
                                                  answer/r = K         <----  answers with the key
    sees K in every answer: all are there   <---- answer/1 ... answer/N-1

    from then on all use the keys attempt-K/...

Rank 0 repeats its welcome until all have answered. What an earlier attempt has left fools nobody: an old welcome lacks
rank r's new word, an old answer lacks rank 0's new key.

`open_store` waits in steps of at most a second, between which Python hears a signal: torch's own waits do not.
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from datetime import timedelta
from functools import partial

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from loqt_scale.process.environment import (
    OWN,
    Environment,
    agent_hosts_store,
    hosts_store,
    launched_rank,
    launched_world_size,
    meeting_place,
)
from loqt_scale.strategies.bounded import bounded

_POLL_SECONDS = 0.02


def open_store(timeout_seconds: float, environment: Environment = OWN) -> Store:
    """The store that the ranks of this attempt share. Every rank; only torchrun's wait for each other here.

    Args:
        timeout_seconds: How long to wait for rank 0, or for torchrun's agent; then the limit of a wait for a key.
        environment: MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE.

    Raises:
        ConnectionError: It cannot be reached, or rank 0 cannot listen at the port.
    """
    host, port = meeting_place(environment)
    deadline, timeout = time.monotonic() + timeout_seconds, timedelta(seconds=timeout_seconds)
    store = _serve(host, port) if hosts_store(environment) else _connect(host, port, deadline)
    store.set_timeout(timeout)
    if not agent_hosts_store(environment):
        return store
    return fresh_store(store, launched_rank(environment), launched_world_size(environment), timeout)


class StoreLine:
    """Says whether the process that keeps the store is there, without a word to it.

    torch's own clients print a page of C++ frames when it has gone. A process's end closes its connections, so one that
    carries nothing shows it.

    Args:
        environment: MASTER_ADDR, MASTER_PORT, RANK.

    Raises:
        ConnectionError: It cannot be reached.
    """

    def __init__(self, environment: Environment = OWN) -> None:
        self._socket: socket.socket | None = None  # to this process itself: none
        if not hosts_store(environment):
            self._socket = socket.create_connection(meeting_place(environment), timeout=30.0)
            self._socket.setblocking(False)

    def alive(self) -> bool:
        """Whether it is still there. Local."""
        try:
            return self._socket is None or self._socket.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:  # nothing has been said
            return True
        except OSError:
            return False


def _serve(host: str, port: int) -> Store:
    try:
        return TCPStore(host, port, is_master=True, wait_for_workers=False, multi_tenant=True)
    except RuntimeError as error:
        raise ConnectionError(
            f"rank 0 cannot listen at MASTER_PORT {port} ({_first_line(error)}); set MASTER_PORT to a free port, the "
            "same on all ranks"
        ) from None


def _connect(host: str, port: int, deadline: float) -> Store:
    while True:
        try:  # torch's own attempts print a page of C++ frames each; it is asked when somebody listens
            socket.create_connection((host, port), timeout=1.0).close()
            return bounded(partial(_join, host, port), deadline - time.monotonic())
        except (OSError, RuntimeError) as error:
            if time.monotonic() > deadline:
                raise ConnectionError(
                    f"rank 0 cannot be reached at MASTER_ADDR {host}, MASTER_PORT {port} ({_first_line(error)}); its "
                    "own output says why, or the address is wrong"
                ) from None
            time.sleep(_POLL_SECONDS)


def _join(host: str, port: int) -> Store:
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].strip()


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
