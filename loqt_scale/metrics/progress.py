"""Progress of a run for whoever watches it: a bar on a terminal, a few plain lines in a log file.

A bar that is redrawn 10000 times makes a log file unreadable, so without a terminal a run prints its first step, about
twenty more, and the lines that mean something (merges, evaluations).
"""

from __future__ import annotations

import math
import os
import sys
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from loqt_scale.config import ProgressMode
from loqt_scale.metrics.console import Console
from loqt_scale.metrics.text import format_count, format_duration, format_perplexity

PLAIN_LINES = 20
BAR_FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Progress:
    """Reports steps done.

    Args:
        total_steps: Optimizer steps of the run.
        enabled: False on all ranks but one: every call then does nothing.
        mode: on = a bar on stderr; off = plain lines on stdout; auto = a bar if stderr is a terminal.
        initial_step: Steps done before this process began.

    The time left is reckoned from the pace since the first step that is reported: neither what lies before it (the
    model's construction, an evaluation) nor what an earlier process has done says how long a step takes.
    """

    def __init__(
        self, total_steps: int, *, enabled: bool = True, mode: ProgressMode = "auto", initial_step: int = 0
    ) -> None:
        self._total, self._enabled = total_steps, enabled
        self._console = Console()
        self._first: tuple[int, float] | None = None  # the first reported step, and when it was
        self._every = max(1, math.ceil(total_steps / PLAIN_LINES))
        self._next_plain = initial_step + 1
        self._loss: float | None = None
        self._bar: tqdm[Any] | None = None
        if enabled and (mode == "on" or (mode == "auto" and _on_terminal())):
            # dynamic_ncols: the bar follows the window; smoothing 0.1: the ETA recovers soon after a merge.
            self._bar = tqdm(
                total=total_steps, initial=initial_step, dynamic_ncols=True, smoothing=0.1, bar_format=BAR_FORMAT
            )

    def update(self, step: int, *, loss: float | None = None, tokens_per_second: float | None = None) -> None:
        """Report that `step` optimizer steps are done.

        Args:
            step: Steps done, from 1 to `total_steps`.
            loss: Mean cross-entropy in nats; None repeats the last one (reading a loss waits for the device).
            tokens_per_second: Rate over all ranks.
        """
        if not self._enabled:
            return
        self._loss = self._loss if loss is None else loss
        if self._first is None:
            self._start_clock(step)
        fields = self._fields(tokens_per_second)
        if self._bar is not None:
            self._draw(self._bar, step, fields)
        elif step >= self._next_plain or step >= self._total:
            self._next_plain = (step // self._every + 1) * self._every
            self.line("  ".join([f"step {step}/{self._total}", *fields, f"eta {format_duration(self._eta(step))}"]))

    def line(self, text: str) -> None:
        """Print one line on stdout, above the bar if there is one."""
        if not self._enabled:
            return
        if self._bar is None:
            self._console.line(text)
            return
        try:
            with self._bar.external_write_mode(file=sys.stdout):
                self._console.line(text)
        except OSError:
            self._drop_bar()

    def _draw(self, bar: tqdm[Any], step: int, fields: list[str]) -> None:
        bar.set_postfix_str("  ".join(fields), refresh=False)
        try:
            bar.update(step - bar.n)
        except OSError:  # its terminal has gone
            self._drop_bar()

    def _drop_bar(self) -> None:
        if self._bar is not None:
            self._bar.disable = True  # else it would draw itself once more when it is freed
        self._bar = None

    def close(self) -> None:
        """Leave the bar as it is and release the terminal line; a second call does nothing. Lines can still follow."""
        try:
            if self._bar is not None:
                self._bar.close()
        except OSError:
            pass
        self._drop_bar()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fields(self, tokens_per_second: float | None) -> list[str]:
        fields = []
        if self._loss is not None:
            fields += [f"loss {self._loss:.4f}", f"ppl {format_perplexity(self._loss)}"]
        if tokens_per_second is not None:
            fields.append(f"{format_count(tokens_per_second)} tok/s")
        return fields

    def _start_clock(self, step: int) -> None:
        self._first = step, time.perf_counter()
        if self._bar is not None:
            self._bar.initial = self._bar.n = self._bar.last_print_n = step
            self._bar.unpause()

    def _eta(self, step: int) -> float:
        assert self._first is not None
        (first, when), left = self._first, self._total - step
        if left == 0:
            return 0.0
        return (time.perf_counter() - when) / (step - first) * left if step > first else math.inf


def _on_terminal() -> bool:
    """Whether stderr is a terminal with room for a bar: some launchers give a terminal of no columns."""
    if not sys.stderr.isatty():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except OSError:  # a stand-in without a file descriptor, e.g. a notebook's
        return True
