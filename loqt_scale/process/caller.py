"""Warnings that name a line of the program that uses this package, however deep in the package they arise."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

_PACKAGE = __name__.partition(".")[0]
# what stands between a program and this package: modules that call others, decorators, training loops
_BETWEEN = {"torch", "contextlib", "transformers", "trl", "accelerate", "lightning", "lightning_fabric", "deepspeed"}


def warn_caller(text: str) -> None:
    """Warns of what a person did: in place of `warnings.warn`, whose `stacklevel` counts frames and is soon wrong.

    Args:
        text: What is wrong and what to write instead.
    """
    frame = _of_program(sys._getframe(1))
    names = frame.f_globals
    warnings.warn_explicit(
        text,
        UserWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=names.get("__name__"),
        registry=names.setdefault("__warningregistry__", {}),
    )


def _of_program(frame: FrameType) -> FrameType:
    """The nearest frame that is neither ours nor between; the outermost if there is none, as in a thread of ours."""
    while frame.f_back is not None:
        root = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if root != _PACKAGE and root not in _BETWEEN:
            break
        frame = frame.f_back
    return frame
