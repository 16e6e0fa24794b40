"""A pool of rank processes that live for the whole test session: starting a rank costs much more than a task on it.

Ranks are forks of one process that has imported what they need, and has done nothing else.

`RankPool.run(world_size, "module:function", **arguments)` gives the first `world_size` processes the environment that a
launcher would (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), calls the function in each, and returns their
results by rank. Whoever raises makes `run` raise with that rank's traceback, and the pool is started afresh.
"""

from __future__ import annotations

import importlib
import os
import socket
import traceback
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

IMPORTED = ["loqt_scale.training.job", "deepspeed", "bitsandbytes"]
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class RankFailed(RuntimeError):
    """A rank raised; the message holds its traceback."""


def _serve(connection: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            environment, target, arguments = connection.recv()
        except EOFError:
            return
        for key in ENVIRONMENT:
            os.environ.pop(key, None)
        os.environ.update(environment)
        try:
            module, _, name = target.partition(":")
            result = getattr(importlib.import_module(module), name)(**arguments)
            connection.send((True, result))
        except BaseException:
            connection.send((False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RankPool:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, world_size: int, target: str, *, timeout: float = 150.0, **arguments: Any) -> list[Any]:
        """Calls `target` on ranks 0 .. world_size - 1; results by rank.

        Raises:
            RankFailed: A rank raised or did not answer in `timeout` seconds.
        """
        try:
            return self._run(world_size, target, timeout, arguments)
        except BaseException:  # a time-out of the test too: ranks that hang must not meet the next test
            self.close()
            raise

    def _run(self, world_size: int, target: str, timeout: float, arguments: dict[str, Any]) -> list[Any]:
        while len(self._ranks) < world_size:
            self._start()
        shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        connections = [connection for _, connection in self._ranks[:world_size]]
        for rank, connection in enumerate(connections):
            launched = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {}
            connection.send((launched, target, arguments))
        results: dict[int, Any] = {}
        while len(results) < world_size:
            pending = [c for rank, c in enumerate(connections) if rank not in results]
            ready = wait(pending, timeout)
            if not ready:
                raise RankFailed(f"ranks {sorted(set(range(world_size)) - set(results))} gave no answer in {timeout}s")
            for connection in ready:
                rank = connections.index(connection)  # type: ignore[arg-type]
                good, value = connection.recv()  # type: ignore[union-attr]
                if not good:
                    raise RankFailed(f"rank {rank}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(world_size)]

    def _start(self) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        self._ranks.append((process, ours))

    def close(self) -> None:
        """Ends all rank processes."""
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join(10)
        self._ranks.clear()
