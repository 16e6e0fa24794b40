"""The types of settings: whether a value has one, and what they are called in messages."""

from __future__ import annotations

import types
from dataclasses import is_dataclass
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin

DICT_EXAMPLE = "a mapping such as {name: value}"


def has_type(value: object, hint: Any) -> bool:
    """Whether a value is of a setting's type: where a program makes settings, nothing else looks at that."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(has_type(value, each) for each in inner)
    if origin is Literal:
        return value in inner and not isinstance(value, bool)
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            return False
        each = inner if origin is tuple and ... not in inner else inner[:1] * len(value)
        return len(value) == len(each) and all(map(has_type, value, each))
    if origin is dict:
        return isinstance(value, dict) and all(has_type(item, inner[1]) for item in value.values())
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)


def accepts_none(hint: Any) -> bool:
    """Whether null may be written for a setting of this type."""
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


def takes_bool(hint: Any) -> bool:
    """Whether true and false are what is written for a setting of this type."""
    return hint is bool or (accepts_none(hint) and bool in get_args(hint))


def chooses_numbers(hint: Any) -> bool:
    """Whether one of a few numbers may be written for a setting of this type, and no text."""
    if get_origin(hint) is Literal:
        return all(isinstance(choice, int) for choice in get_args(hint))
    return accepts_none(hint) and all(chooses_numbers(arg) for arg in get_args(hint) if arg is not type(None))


def describe_type(hint: Any) -> str:
    """Say in words what may be written for a setting of this type."""
    origin, args = get_origin(hint), get_args(hint)
    if accepts_none(hint):
        return " or ".join([*(describe_type(arg) for arg in args if arg is not type(None)), "null"])
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is list:
        return "a list such as [{name: value}]" if get_origin(args[0]) is dict else "a list such as [a, b]"
    if origin is tuple:
        return f"a list of {len(args)} numbers such as [{', '.join(['0.9'] * len(args))}]"
    if origin is dict:
        return (
            f"a mapping such as {{name: value}}, each value {describe_type(args[1])}" if int in args else DICT_EXAMPLE
        )
    if is_dataclass(hint):
        return f"{hint.__name__}(...)" if isinstance(hint, type) else str(hint)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text (quote it if it is a number)"}
    return words.get(hint, str(hint))
