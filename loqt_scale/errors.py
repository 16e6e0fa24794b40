"""What a person can mend, and the boundary at which a library's exception becomes that.

Every error of this package that is written for a person is a `UserError`: one line, which says what is wrong and what
to write instead. Libraries raise what they like (`KeyError: 'evil'` for an activation that does not exist). So each
call into a library with something that came from a person stands inside `explained`, which says what was being done:

    with explained(f"model.overrides {overrides} do not make a llama model", "write other model.overrides"):
        model = AutoModelForCausalLM.from_config(config)

What comes out of the package as anything else is a bug of ours, but for what the machine did (`machine_error`). The
command line (`cli.run_command`) is the only place that prints either.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

_REASON_CHARS = 300
# exceptions whose message says little without their name
_NAMED = (LookupError, AttributeError, TypeError, AssertionError, ArithmeticError)
_OUT_OF_MEMORY = re.compile(
    r"out of memory|MemoryError|DefaultCPUAllocator|can(not|'t) allocate memory|Unable to allocate", re.IGNORECASE
)
_ROOM = "make room on its disk, or have the quota raised"
_RIGHTS = "give this user the right to it"
_OTHER_KIND = "something else has this name: rename or remove it"
# what no program does wrong: the machine's even where the system names no file, as write() and fsync() do not
_OF_A_DISK = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EROFS: "its disk is mounted read-only: mount it for writing",
    errno.EIO: "its disk does not work: look at the system's log",
    errno.ESTALE: "its network disk has changed meanwhile: mount it again",
}
_WITH_A_NAME = {
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EISDIR: _OTHER_KIND,
    errno.EEXIST: _OTHER_KIND,
    errno.ENOTDIR: _OTHER_KIND,
    errno.ENOENT: "it is not there, or not any more: put it back",
    errno.EMFILE: "too few files may be open at once: raise ulimit -n",
}


class UserError(ValueError):
    """Something that a person can mend; the message, one line, says what is wrong and what to write instead."""


class ConfigError(UserError):
    """A setting that cannot work; the message names its key and what to write instead."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that a setting names, and that is not there."""


class OccupiedFolderError(UserError, FileExistsError):
    """A folder that already holds what must not be overwritten."""


class NotAFolderError(UserError, NotADirectoryError):
    """A path that a setting names as a folder, and that is none."""


class UnwritableError(UserError, PermissionError):
    """A file or folder that cannot be made, moved or written."""


def require_kind(value: object, kind: type | tuple[type, ...], name: str, advice: str) -> None:
    """Refuses an argument of another type, a class in the place of an object too.

    Args:
        value: The argument.
        kind: What it should be, or several.
        name: What it is called, "the model" say.
        advice: What to write.

    Raises:
        UserError: Its type, and `advice`.
    """
    if not isinstance(value, kind):
        raise UserError(f"{name} is {described(value)}; {advice}")


def described(value: object) -> str:
    """What an argument is, in words: "a str", "the class AdamW", "None"."""
    if value is None:
        return "None"
    name = value.__name__ if isinstance(value, type) else type(value).__name__
    return f"the class {name}" if isinstance(value, type) else f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


@contextmanager
def explained(
    what: str, advice: str = "", *, of: tuple[type[Exception], ...] = (Exception,), kind: type[UserError] = UserError
) -> Iterator[None]:
    """Context of a library call: its exceptions leave as `kind("what: reason; advice")`, with their cause.

    Args:
        what: What went wrong, in the terms of the settings.
        advice: What to write instead.
        of: Exceptions that are the person's to mend here; others, and every `UserError`, pass.
        kind: What is raised.
    """
    try:
        yield
    except UserError:
        raise
    except of as error:
        reason = reason_of(error, known=what)
        raise kind(f"{what}: {reason}{f'; {advice}' if advice else ''}") from error


def reason_of(error: BaseException, known: str = "") -> str:
    """A library's exception on one line of bounded length; a file is named unless it is in what is `known`."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        named = error.filename is not None and str(error.filename) not in known
        text = f"{error.strerror}: {error.filename}" if named else error.strerror
    if not text:
        return type(error).__name__
    return shortened(f"{type(error).__name__}: {text}" if isinstance(error, _NAMED) else text, _REASON_CHARS)


def one_line(error: BaseException) -> str:
    """An error's kind and message, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def first_mistake(error: ValidationError) -> str:
    """The first thing that a pydantic schema found wrong, and where; what a stranger wrote is escaped and cut."""
    first = error.errors(include_url=False)[0]
    names = (shortened(ascii(part)) if isinstance(part, str) else str(part) for part in first["loc"])
    return f"{'.'.join(names) or 'as a whole'}: {first['msg']}, got {shortened(ascii(first['input']))}"


def shortened(text: str, most: int = 80) -> str:
    """A text of at most `most` characters: a longer one loses its middle."""
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def machine_error(error: BaseException) -> str | None:
    """What to tell a person of an exception that is the machine's doing: full memory, a disk; None if it is not."""
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return (
            f"memory is full ({reason_of(error)}); loqt-scale plan with the same settings says what they need and "
            "what makes it fit"
        )
    if "Duplicate GPU detected" in str(error):
        return "two ranks use one GPU; start as many ranks per node as GPUs, or let the launcher show each task its own"
    if isinstance(error, OSError) and error.strerror and (error.filename is not None or error.errno in _OF_A_DISK):
        named = "" if error.filename is None else f"{error.filename}: "
        return f"{named}{error.strerror}; {advice_on(error)}"
    # torch.distributed's own, by name: this module imports no torch
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__name__.startswith("Dist"):
        return f"the ranks do not reach one another ({reason_of(error)}); look at what other ranks say, at MASTER_ADDR"
    return None


def advice_on(error: OSError) -> str:
    """What a person can do where the system refuses to read or write a file."""
    return (_OF_A_DISK | _WITH_A_NAME).get(error.errno or 0, "look at this path and its disk")


@contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Context in which one file is written: an OSError that leaves it names a file, as those of write() do not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise
