"""A DeepSpeed JSON as one flat dict of dotted keys: {"zero_optimization.stage": 2, ...}, and back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loqt_scale.errors import ConfigError


def read_zero_json(path: str | None) -> dict[str, Any]:
    """Reads `parallel.zero_config`.

    Args:
        path: The file; None is an empty one.

    Returns:
        Dotted keys and their values. A value "auto" or null is left out: both mean "not said here".

    Raises:
        ConfigError: The file cannot be read, or is not JSON.
    """
    if path is None:
        return {}
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"parallel.zero_config is '{path}', which does not exist; write a JSON file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"parallel.zero_config is '{path}', which cannot be read: {error}") from None
    with naming(path):
        return flattened(_parse(text))


def flattened(tree: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys and values of what a file says, or of a dict as DeepSpeed takes it; without "auto" and null."""
    return {key: value for key, value in _leaves(tree) if value is not None and value != "auto"}


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of dotted keys that DeepSpeed reads; shares no dict with `values`.

    Raises:
        ConfigError: A key has a value, and keys below it as well.
    """
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *blocks, name = key.split(".")
        block = tree
        for above in blocks:
            block = block.setdefault(above, {})
        block[name] = value
        if clash := next((other for other in values if other.startswith(f"{key}.")), None):
            raise ConfigError(f'{key} is {shown(value)}; write an object such as {{"{clash[len(key) + 1 :]}": ...}}')
    return tree


@contextmanager
def naming(path: str | None) -> Iterator[None]:
    """Puts the file's name, if there is a file, before an error's message."""
    try:
        yield
    except ConfigError as error:
        raise (error if path is None else ConfigError(f"{path}: {error}")) from error.__cause__


def shown(value: Any) -> str:
    """A value as JSON writes it, shortened."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _leaves(block: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in block.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _parse(text: str) -> dict[str, Any]:
    try:
        tree = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ConfigError(f"it is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"it holds {shown(tree)}; write an object such as {{...}}")
    return tree


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree:
            raise ConfigError(f"key '{key}' is written twice; keep one of them")
        tree[key] = value
    return tree
