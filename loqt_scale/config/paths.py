"""Settings that are paths: `~` and `$VARIABLES` in them, and when two of them mean the same.

A shell expands them in `--train.run_dir ~/runs/a`, but not in `--train.run_dir=~/runs/a` nor in YAML, where they would
make a folder called `~`.
"""

from __future__ import annotations

import glob
import os
import re

from loqt_scale.errors import ConfigError, shortened
from loqt_scale.process.environment import has_variable

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")
_NAME_BYTES, _PATH_BYTES = 255, 4095  # what file systems take


def expand_path(text: str, key: str) -> str:
    """A path with `~`, `~user`, `$NAME` and `${NAME}` replaced. A file that is called so as it stands wins.

    Args:
        text: What was written: a path, a glob, or a Hugging Face id, in which nothing is found to replace.
        key: The setting, for errors.

    Raises:
        ConfigError: It is empty, a variable is not set, a user is not known, or it is longer than paths can be.
    """
    if not text:
        raise ConfigError(f"{key} is empty; write a path, or leave it out")
    _check_length(text, key)
    if ("~" not in text[:1] and "$" not in text) or os.path.lexists(text):
        return text
    names = [bare or braced for bare, braced in _VARIABLE.findall(text)]
    for name in names:
        if not has_variable(name):
            raise ConfigError(
                f"{key} is '{shortened(text)}', but the variable {name} is not set; set it, or write it out"
            )
    expanded = os.path.expanduser(os.path.expandvars(text))
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise ConfigError(f"{key} is '{shortened(text)}', but {user} is nobody's home here; write the path in full")
    _check_length(expanded, key)
    return expanded


def same_files(one: str | list[str] | None, other: str | list[str] | None) -> bool:
    """Whether two values of a setting that is a path mean the same, however they are spelled.

    Args:
        one: A path, a Hugging Face id, or several paths and globs; None: not set.
        other: Another one.
    """
    return one is not None and other is not None and _meant(one) == _meant(other)


def _meant(value: str | list[str]) -> list[str]:
    """Absolute paths without links, in their order, of what is there or would be; ids too, which is as good."""
    names = [name for pattern in ([value] if isinstance(value, str) else value) for name in _matches(pattern)]
    return list(dict.fromkeys(map(os.path.realpath, names)))


def _matches(pattern: str) -> list[str]:
    """The files that a glob matches, sorted; the pattern itself if there are none, or if something is called so."""
    if os.path.exists(pattern) or not glob.has_magic(pattern):
        return [pattern]
    return sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True))) or [pattern]


def _check_length(text: str, key: str) -> None:
    longest = max(len(os.fsencode(part)) for part in text.split("/"))
    if longest > _NAME_BYTES or len(os.fsencode(text)) > _PATH_BYTES:
        raise ConfigError(
            f"{key} is '{shortened(text)}', a path of {len(text)} characters; file systems take names of "
            f"{_NAME_BYTES} bytes and paths of {_PATH_BYTES}: write a shorter one"
        )
