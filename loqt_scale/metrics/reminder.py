"""Telling people of a trouble that lasts: once, and again at growing distances."""

from __future__ import annotations

from collections.abc import Callable

Tell = Callable[[str], None]


class Reminder:
    """Tells of one kind of trouble at its first, second, fourth, eighth, ... time in a row, and when it is over.

    Args:
        tell: Takes a line for people.
    """

    def __init__(self, tell: Tell) -> None:
        self._tell, self.times = tell, 0

    def trouble(self, text: str) -> None:
        """It has happened, once more perhaps."""
        self.times += 1
        if self.times & (self.times - 1) == 0:
            self.insist(text + (f" ({self.times} times by now)" if self.times > 1 else ""))

    def insist(self, text: str) -> None:
        """Tells in any case."""
        self._tell(f"WARNING: {text}")

    def over(self, text: str) -> None:
        """It has gone well; told only after a trouble."""
        if self.times:
            self._tell(text)
        self.times = 0
