"""The names of all settings, and what may be written for each.

The dataclasses in `config` are the only list of settings. This module reads that list back from them, so that an
error can say what to write instead without a second table that goes stale:

* `path_settings()` are those that hold paths;
* `setting_types()` maps every dotted key (`loqt.merge.gap`) to its type;
* `plain_message()` words the error of a value of the wrong type;
* `unknown_key_message()` names the nearest key for a misspelt one;
* `check_yaml_keys()` walks a parsed YAML tree and refuses what is not in the list.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache, reduce
from typing import Any, get_origin

from loqt_scale.config import RunConfig
from loqt_scale.config.kinds import chooses_numbers, describe_type
from loqt_scale.errors import ConfigError, shortened


@cache
def setting_types() -> dict[str, Any]:
    """Map every dotted setting of `RunConfig` to its (resolved) type, in the order of the dataclasses."""
    return {key: hint for key, hint in _walk(RunConfig, "") if not is_dataclass(hint)}


@cache
def setting_groups() -> frozenset[str]:
    """Dotted names of the groups: loqt, loqt.merge, …"""
    return frozenset(key for key, hint in _walk(RunConfig, "") if is_dataclass(hint))


@cache
def path_settings() -> frozenset[str]:
    """Dotted settings that hold a path, or several."""
    return frozenset(_paths(RunConfig, ""))


def _paths(cls: type, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for item in fields(cls):
        if is_dataclass(hints[item.name]):
            yield from _paths(typing.cast(type, hints[item.name]), f"{prefix}{item.name}.")
        elif item.metadata.get("path"):
            yield prefix + item.name


def _walk(cls: type, prefix: str) -> list[tuple[str, Any]]:
    hints = typing.get_type_hints(cls)
    found: list[tuple[str, Any]] = []
    for item in fields(cls):
        hint = hints[item.name]
        found.append((prefix + item.name, hint))
        if is_dataclass(hint):
            found.extend(_walk(typing.cast(type, hint), f"{prefix}{item.name}."))
    return found


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """Every setting's value by its dotted key."""
    return {key: reduce(getattr, key.split("."), config) for key in setting_types()}


def owner_of(key: str) -> str | None:
    """Return the setting that `key` belongs to: itself, or the mapping it reaches into (`model.overrides.x`)."""
    if key in setting_types():
        return key
    for name, hint in setting_types().items():
        if get_origin(hint) is dict and key.startswith(name + "."):
            return name
    return None


def plain_message(message: str, hints: Mapping[str, Any]) -> str:
    """Reword jsonargparse's type error in the terms of the settings (name -> type); other messages on one line."""
    pattern = r'Parser key "(?P<key>[\w.]+)":.*(Got|Given) value: (?P<value>.*)'  # Given: of a type with alternatives
    found = re.search(pattern, message, flags=re.DOTALL)
    if found is None or found["key"] not in hints:
        return shortened(" ".join(message.split()), 300)
    value, hint = found["value"].strip(), hints[found["key"]]
    is_number = value.isdecimal() and chooses_numbers(hint)
    shown = "null" if value == "None" else value if is_number else f"'{shortened(value)}'"
    return f"{found['key']} is {shown}; write {describe_type(hint)}"


def unknown_key_message(key: str) -> str:
    """Message for a key that is no setting, with the nearest one that is."""
    known = [*setting_types(), *setting_groups(), "config", "print_config", "help"]
    leaf = key.rpartition(".")[2]
    same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
    nearest = difflib.get_close_matches(key, same_leaf or known, n=1, cutoff=0.0 if same_leaf else 0.6)
    hint = f"did you mean '{nearest[0]}'?" if nearest else "see --help for the list of settings"
    return f"unknown key '{shortened(key)}'; {hint}"


def check_yaml_keys(tree: object, prefix: str = "") -> None:
    """Check that a parsed YAML tree holds settings only, each at its place.

    Args:
        tree: What the YAML file holds; an empty file (None) is a run with all defaults.
        prefix: Dotted name of the group that `tree` belongs to, with a trailing dot; empty at the top.

    Raises:
        ConfigError: A key is unknown, written with a dot, or a group is not a mapping.
    """
    name = prefix.rstrip(".")
    if not isinstance(tree, Mapping):
        shown = "empty" if tree is None else repr(tree)
        what = f"'{name}' is {shown}, but it is a group of settings" if name else f"it holds {tree!r}"
        example = f"{name.rpartition('.')[2]}: {{...}}" if name else "key: value lines"
        raise ConfigError(f"{what}; write {example}" + (", or leave the group out" if name else ""))
    for raw_key, value in tree.items():
        key = f"{prefix}{raw_key}"
        if "." in str(raw_key):
            raise ConfigError(
                f"key '{key}' has a dot; in YAML write it nested: {str(raw_key).replace('.', ': {', 1)}: …}}"
            )
        if key in setting_groups():
            check_yaml_keys(value, key + ".")
        elif key not in setting_types():
            raise ConfigError(unknown_key_message(key))
