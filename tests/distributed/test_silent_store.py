"""The process that keeps the ranks' store stands still: whoever asks it gets no answer, ever, and ends all the same."""

from __future__ import annotations

import os
import queue
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from loqt_scale.strategies import LostRankError, RollCall, open_store


class Line:
    """The network between a rank and the one that keeps the store. `held`: nothing gets through."""

    def __init__(self, port: int) -> None:
        self.held = threading.Event()
        self._port, self._let = port, threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, far = self._listening.accept()[0], socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                return
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(4096):
                if self.held.is_set():
                    self._let.wait()
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._let.set()
        self._listening.close()


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Line, TCPStore]]:
    """A store that this process keeps, and the way to it."""
    from loqt_scale.strategies import roll_call

    for name, seconds in {"PULSE_SECONDS": 0.05, "SILENT_SECONDS": 0.3, "WORD_SECONDS": 0.2}.items():
        monkeypatch.setattr(roll_call, name, seconds)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    line = Line(store.port)
    yield line, store
    line.close()


def test_a_rank_that_waits_ends_when_the_keeper_of_the_store_stands_still(
    far: tuple[Line, TCPStore], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its thread's own question to the store is never answered: another thread looks at the time."""
    line, store = far
    ended: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(os, "_exit", ended.put)
    there = TCPStore("127.0.0.1", line.port, is_master=False, wait_for_workers=False)
    calls = [
        RollCall(store, 0, 2, timeout_seconds=60, keeps_store=True),
        RollCall(there, 1, 2, timeout_seconds=1, keeps_store=False),
    ]
    calls[0]._publish(store)
    for call in (calls[1], calls[0]):
        call.start()
    line.held.set()
    assert ended.get(timeout=20) == 2
    assert re.search(r"rank 1: error: rank 0 \(process \d+ on .*\) is missing", capsys.readouterr().err)
    line.close()
    for call in calls:
        call.close()


def test_the_keeper_of_the_store_stands_still_before_all_have_come(far: tuple[Line, TCPStore]) -> None:
    line, _ = far
    there = TCPStore("127.0.0.1", line.port, is_master=False, wait_for_workers=False)
    line.held.set()
    with pytest.raises(LostRankError, match=r"rank 0 of 2 has not answered within 1 s \(parallel\.timeout_seconds\)"):
        RollCall(there, 1, 2, timeout_seconds=1, keeps_store=False).start()
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(line.port), "RANK": "1", "WORLD_SIZE": "2"}
    with pytest.raises(ConnectionError, match=r"rank 0 cannot be reached .* \(no answer within 1 s\)"):
        open_store(1.0, launched)
