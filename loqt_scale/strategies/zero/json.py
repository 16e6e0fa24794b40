"""Reading a DeepSpeed JSON strictly, and before DeepSpeed does: known keys, right types, nothing that must be refused.

DeepSpeed passes over unknown keys at the top, and refuses others only when the model has been allocated. What is "auto"
or null is left out of the result: both mean "not said here".
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loqt_scale.errors import ConfigError
from loqt_scale.strategies.zero.keys import (
    CHOICES,
    FIXED,
    KEYS,
    POSITIVE,
    REFUSED,
    REQUIRED_PARAMETERS,
    SCHEDULERS,
    Kind,
)

AUTO = "auto"
Tree = dict[str, Any]

_KIND_WORDS: dict[Kind, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object such as {...}",
}


def read_zero_json(path: str | None) -> Tree:
    """Reads `parallel.zero_config`.

    Args:
        path: The file; None is an empty one.

    Raises:
        ConfigError: It cannot be read, is not JSON, or holds what cannot work here whatever our settings are.
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
        tree = _typed(_parse(text), "")
        _check_ranges(tree)
        _check_fixed(tree)
        _check_optimizer(tree)
        _check_scheduler(tree)
    return tree


@contextmanager
def naming(path: str | None) -> Iterator[None]:
    """Puts the file's name, if there is a file, before an error's message."""
    try:
        yield
    except ConfigError as error:
        raise (error if path is None else ConfigError(f"{path}: {error}")) from None


def lookup(tree: Tree, key: str) -> Any:
    """The value of a dotted key, or None."""
    value: Any = tree
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def shown(value: Any) -> str:
    """A value as JSON writes it, shortened."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- JSON ----------------------------------------------------------------------------------------------------------


def _parse(text: str) -> Tree:
    try:
        tree = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ConfigError(f"it is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"it holds {shown(tree)}; write an object such as {{...}}")
    return tree


def _unique(pairs: list[tuple[str, Any]]) -> Tree:
    tree: Tree = {}
    for key, value in pairs:
        if key in tree:
            raise ConfigError(f"key '{key}' is written twice; keep one of them")
        tree[key] = value
    return tree


def _refuse_constant(name: str) -> None:
    raise ConfigError(f"it holds {name}, which is no number of JSON; write a number or null")


# ---- keys and types --------------------------------------------------------------------------------------------------


def _typed(block: Tree, prefix: str) -> Tree:
    """A copy of a block without "auto" and null; refuses unknown keys and wrong types."""
    if not any(key.startswith(prefix) for key in KEYS):
        return _without_auto(block)
    values: Tree = {}
    for name, value in block.items():
        key = prefix + name
        if key not in KEYS and key not in REFUSED:
            raise ConfigError(_unknown_key(key, prefix))
        if value is None or value == AUTO:
            continue
        if key in REFUSED:
            raise ConfigError(f"{key} is {shown(value)}, but {REFUSED[key]}")
        values[name] = _typed_value(key, value)
    return values


def _typed_value(key: str, value: Any) -> Any:
    kind = KEYS[key]
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON writes 5e8
    right = isinstance(value, (int, float) if kind is float else kind)
    if not right or (isinstance(value, bool) and kind in (int, float)):
        raise ConfigError(f"{key} is {shown(value)}; write {_KIND_WORDS[kind]}")
    return _typed(value, f"{key}.") if kind is dict else value


def _without_auto(block: Tree) -> Tree:
    kept = {key: value for key, value in block.items() if value is not None and value != AUTO}
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _unknown_key(key: str, prefix: str) -> str:
    """Message with the nearest key: one of the same name at another place, else one spelt alike at this place."""
    leaf = key.rpartition(".")[2]
    elsewhere = [known for known in KEYS if known.rpartition(".")[2].removeprefix("stage3_") == leaf]
    beside = [known.removeprefix(prefix) for known in KEYS if known.startswith(prefix)]
    alike = [prefix + name for name in difflib.get_close_matches(leaf, beside, n=1)]
    nearest = elsewhere or alike
    return f"unknown key '{key}'; " + (f"did you mean '{nearest[0]}'?" if nearest else "leave it out")


# ---- values ----------------------------------------------------------------------------------------------------------


def _check_ranges(tree: Tree) -> None:
    for key, (choices, note) in CHOICES.items():
        value = lookup(tree, key)
        if value is not None and value not in choices:
            raise ConfigError(f"{key} is {shown(value)}; {note}write one of {', '.join(map(str, choices))}")
    for key, kind in KEYS.items():
        value, least = lookup(tree, key), 1 if key in POSITIVE else 0
        bounded = least == 1 or not key.startswith("scheduler.")
        if kind in (int, float) and bounded and value is not None and value < least:
            raise ConfigError(f"{key} is {shown(value)}; write {least} or more")
    bucket = lookup(tree, "zero_optimization.allgather_bucket_size")
    if bucket is not None and bucket % 2 == 1:
        raise ConfigError(f"zero_optimization.allgather_bucket_size is {bucket}; DeepSpeed wants an even number")


def _check_fixed(tree: Tree) -> None:
    for key, (allowed, reason) in FIXED.items():
        value = lookup(tree, key)
        same = value == allowed and isinstance(value, bool) == isinstance(allowed, bool)
        if value is not None and not same:
            raise ConfigError(f"{key} is {shown(value)}, but {reason}; write {shown(allowed)}, or leave it out")


def _check_optimizer(tree: Tree) -> None:
    name = lookup(tree, "optimizer.type")
    if name is not None and name.lower() not in ("adam", "adamw"):
        raise ConfigError(
            f"optimizer.type is {shown(name)}, but only AdamW is supported: DeepSpeed would build any other over every "
            'parameter, the frozen codes included; write "AdamW", or leave the block out'
        )


def _check_scheduler(tree: Tree) -> None:
    if "scheduler" not in tree:
        return
    name, given = lookup(tree, "scheduler.type"), lookup(tree, "scheduler.params") or {}
    if name is None:
        raise ConfigError(f"scheduler has no type; write one of {', '.join(SCHEDULERS)}, or leave the block out")
    for parameter in given:
        if parameter not in SCHEDULERS[name]:
            known = ", ".join(sorted(SCHEDULERS[name]))
            raise ConfigError(f"scheduler.params.{parameter} is no parameter of {name}; it takes {known}")
    for parameter in REQUIRED_PARAMETERS.get(name, ()):
        if parameter not in given:
            raise ConfigError(
                f"scheduler.params.{parameter} has no value, and no setting of ours is like it; write one"
            )
