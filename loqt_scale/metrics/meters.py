"""How fast and how large a process is, read without disturbing it.

On CUDA a step returns to the host before the device has done it. `RateMeter` does not wait for the device: it averages
the host's clock over a window of steps, and the host cannot run ahead by more than a few of them, the less so as the
caller reads the loss every so often. Over a window the two clocks agree.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RateMeter:
    """Tokens and seconds per optimizer step, seconds waited for text, over the last `window` steps, pauses left out.

    Args:
        window: Steps averaged over.
    """

    def __init__(self, window: int = 50) -> None:
        if window < 1:
            raise ValueError(f"window is {window}; write 1 or more steps")
        self._steps: deque[tuple[float, int, float]] = deque(maxlen=window)
        self._last = time.perf_counter()

    def tick(self, tokens: int, waited: float = 0.0) -> None:
        """Mark the end of a step.

        Args:
            tokens: That it trained on (of all ranks, for the rate of the whole run).
            waited: Seconds of it in which this rank waited for its share of the text.
        """
        now = time.perf_counter()
        self._steps.append((now - self._last, tokens, waited))
        self._last = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside the block (an evaluation, a checkpoint) out of the rates."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._last += time.perf_counter() - begin

    @property
    def seconds_per_step(self) -> float:
        """Mean seconds of a step; 0 before the first."""
        return sum(seconds for seconds, _, _ in self._steps) / len(self._steps) if self._steps else 0.0

    @property
    def waited_per_step(self) -> float:
        """Mean seconds of a step in which it waited for text; 0 before the first."""
        return sum(waited for _, _, waited in self._steps) / len(self._steps) if self._steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second; 0 before the first step."""
        seconds = sum(seconds for seconds, _, _ in self._steps)
        return sum(tokens for _, tokens, _ in self._steps) / seconds if seconds > 0.0 else 0.0


def memory_metrics(device: torch.device | str) -> dict[str, int]:
    """Peak memory of this process in bytes, as metrics.

    Args:
        device: Where the model lives.

    Returns:
        `memory/max_rss_bytes` (resident in host memory) always; on CUDA also `memory/max_allocated_bytes`,
        `memory/max_reserved_bytes` and `memory/reserved_bytes` of the caching allocator. Peaks since the start of the
        process, or since `torch.cuda.reset_peak_memory_stats`.
    """
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    metrics = {"memory/max_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.device(device).type == "cuda":
        metrics["memory/max_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
        metrics["memory/max_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        metrics["memory/reserved_bytes"] = torch.cuda.memory_reserved(device)
    return metrics
