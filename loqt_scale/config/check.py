"""The one way in which a setting is refused, and what holds for every setting of a type."""

from __future__ import annotations

import math
import os
from dataclasses import fields
from typing import Any, get_type_hints

from loqt_scale.config.kinds import describe_type, has_type
from loqt_scale.config.paths import expand_path
from loqt_scale.errors import ConfigError, shortened

PATH = {"path": True}
"""Metadata of a field that holds a path (or several): `~` and `$VARIABLES` in it are expanded."""

MANY = 2**24
"""Tokens of a sequence, sequences of a batch, tokens of a vocabulary: beyond this it is a slip."""

# numbers end up in float32 and in 64-bit integers, whatever they are to Python
_GREATEST, _SMALLEST, _INTEGERS = 3.4e38, 1.2e-38, 2**63


def require(condition: bool, message: str) -> None:
    """Raises ConfigError(message), which names the key and what to write instead, unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def check_values(settings: Any, group: str = "") -> None:
    """Checks every value of a settings dataclass for its type and what that demands, and expands its paths in place.

    Args:
        settings: A frozen dataclass that is being made.
        group: Its dotted name; empty at the top.

    Raises:
        ConfigError: A value of another type; a number that is not finite or has no room in 32-bit floats or 64-bit
            integers; text that cannot be written to a file; a path that cannot be one.
    """
    hints = get_type_hints(type(settings))
    for item in fields(settings):
        key, value, hint = f"{group}.{item.name}".lstrip("."), getattr(settings, item.name), hints[item.name]
        is_path = item.metadata.get("path", False)
        value = _as_text(value) if is_path else value
        require(has_type(value, hint), f"{key} is {shortened(repr(value))}; write {describe_type(hint)}")
        _check(key, value)
        if is_path and value is not None:
            several = [expand_path(text, key) for text in value] if isinstance(value, list) else None
            object.__setattr__(settings, item.name, expand_path(value, key) if several is None else several)


def _as_text(value: Any) -> Any:
    """Paths as programs have them, `pathlib`'s, as text."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return [_as_text(each) for each in value] if isinstance(value, list | tuple) else value


def _check(key: str, value: object) -> None:
    if isinstance(value, float):
        fits = math.isfinite(value) and (value == 0.0 or _SMALLEST <= abs(value) <= _GREATEST)
        require(fits, f"{key} is {value}; write a number that float32 can hold ({_SMALLEST} to {_GREATEST}, or 0)")
    elif isinstance(value, int):
        require(-_INTEGERS <= value < _INTEGERS, f"{key} is a number beyond 64 bits; write a smaller one")
    elif isinstance(value, str):
        require(_is_text(value), f"{key} is {shortened(ascii(value))}; write it without NUL characters, in UTF-8")
    elif isinstance(value, list | tuple):
        for item in value:
            _check(key, item)
    elif isinstance(value, dict):
        _check_mapping(key, value)


def _check_mapping(key: str, mapping: dict[Any, Any]) -> None:
    for name, value in mapping.items():
        require(isinstance(name, str), f"{key} has the key {name!r}, which is no name; write name: value")
        _check(f"{key}.{name}", value)


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # bytes of the command line that are not UTF-8
        return False
    return "\0" not in value
