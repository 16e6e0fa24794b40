"""A line for people on standard error that cannot fail, from wherever in the package it is needed."""

from __future__ import annotations

import sys
from contextlib import suppress


def warn(text: str) -> None:
    """Prints a line on stderr, if there is one."""
    with suppress(OSError, ValueError):  # a closed pipe, a full disk, a closed file
        print(text, file=sys.stderr, flush=True)
