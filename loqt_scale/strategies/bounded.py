"""Calls that may never return: torch's store waits for a stopped process for ever, whatever time-out it was given."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def bounded(call: Callable[[], T], seconds: float) -> T:
    """What a call returns, or raises, if it does so in time. Signals are heard meanwhile.

    Args:
        call: Runs in a thread, which is left behind if it does not end.
        seconds: How long it may take.

    Raises:
        TimeoutError: It has not returned by then.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = call()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, name="bounded", daemon=True)
    thread.start()
    thread.join(max(seconds, 0.0))
    if "error" in outcome:
        raise outcome["error"]
    if "value" not in outcome:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    value: T = outcome["value"]
    return value
