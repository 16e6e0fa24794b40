"""Reading a run's settings from YAML and the command line, and writing them back.

    RunConfig  <-  defaults  <-  --config FILE (each in turn)  <-  --key value overrides

Overrides win wherever they stand on the line: `normalize_argv` moves `--config` to the front. It also gives lists their
short forms (`--data.files a.txt b.txt`, `--data.files+=c.txt`) and refuses unknown keys with the nearest known one.
jsonargparse then does the typing and the help (from the dataclasses' docstrings), and the dataclasses themselves check
the combinations. Whatever goes wrong ends as one `ConfigError`, a sentence that says what to write instead.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser

from loqt_scale.config import RunConfig
from loqt_scale.config.keys import (
    check_yaml_keys,
    owner_of,
    plain_message,
    setting_groups,
    setting_types,
    unknown_key_message,
)
from loqt_scale.config.kinds import accepts_none, describe_type, takes_bool
from loqt_scale.config.paths import expand_path
from loqt_scale.config.strategy_names import check_strategy_name
from loqt_scale.errors import ConfigError, explained, named, reason_of

T = TypeVar("T")

# Booleans of YAML 1.1. A setting that is true or false takes them, any other one takes the word.
WORDS = {"yes": True, "on": True, "no": False, "off": False}

# YAML 1.1, PyYAML's dialect, reads 5e-3 as text. People and jsonargparse read it as a number, so both the loader and
# the dumper (which must then quote the text '5e-3') are taught the YAML 1.2 form.
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)$")


class _Word(str):
    """An unquoted on, off, yes or no: YAML 1.1's booleans, which are the names of some choices here."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 5e-3 as a number, on and off as a `_Word`, and refuses a key that is written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"a key is a list or a mapping (line {line}); write a name")
            if key_node.value in seen:
                raise ConfigError(f"key '{key_node.value}' is written twice (line {line}); keep one of them")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_bool(self, node: yaml.ScalarNode) -> Any:
        """true and false; other words as they are written."""
        text = str(self.construct_scalar(node))
        return _Word(text) if text.lower() in WORDS else super().construct_yaml_bool(node)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which would be read back as a number."""


_Loader.add_constructor("tag:yaml.org,2002:bool", _Loader.construct_yaml_bool)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


_TRAIN = "Train a causal language model with LoQT: low-rank factors over a 4-bit base."


@dataclass
class _Option:
    """One `--key value …` of the command line."""

    key: str
    append: bool = False
    values: list[str] = field(default_factory=list)


def parse_run_config(argv: Sequence[str], prog: str = "loqt-scale train", about: str = _TRAIN) -> RunConfig:
    """Build the settings of a run from command-line arguments.

    Args:
        argv: Arguments without the program and the subcommand: `--config FILE`, `--key value` in any order,
            `--print_config`, `--help`.
        prog: Program name shown by `--help`.
        about: What the command does, shown there too.

    Raises:
        ConfigError: A key, type, file or combination cannot work; the message says what to write instead.
        SystemExit: With status 0, after `--help` or `--print_config` has printed.
    """
    wants_config, config = _parse(argv, prog, about)
    check_strategy_name(config.parallel.strategy)
    if wants_config:
        print(dump_run_config(config), end="")
        raise SystemExit(0)
    return config


def _parse(argv: Sequence[str], prog: str = "", about: str = "") -> tuple[bool, RunConfig]:
    """Whether `--print_config` was there, and the settings."""
    wants_config, arguments = normalize_argv(argv)
    parser = _build_parser(prog, about)
    files = [_settings_of(word) if word.startswith("--config=") else word for word in arguments]
    with explained("the settings cannot be read", kind=ConfigError):
        try:
            values = parser.parse_args([word for word in files if word is not None]).as_dict()
        except ArgumentError as error:
            raise ConfigError(plain_message(str(error), setting_types())) from None
    values.pop("config", None)
    values.pop("print_config", None)
    return wants_config, _build(RunConfig, values)


def override_run_config(settings: RunConfig, argv: Sequence[str], prog: str) -> RunConfig:
    """Settings with those of a command line over them.

    Raises:
        ConfigError: As `parse_run_config`.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        save_run_config(settings, file)
        return parse_run_config([f"--config={file}", *argv], prog=prog)


def dump_run_config(config: RunConfig) -> str:
    """Return the settings as YAML, in the order of the dataclasses."""
    return yaml.dump(_plain(asdict(config)), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def save_run_config(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write the settings to a YAML file that `load_run_config` and `--config` read back exactly."""
    with named(path):
        Path(path).write_text(dump_run_config(config), encoding="utf-8")


def load_run_config(path: str | os.PathLike[str]) -> RunConfig:
    """Read settings written by `save_run_config` (or by hand), whether or not their strategy is installed here.

    Raises:
        ConfigError: As `parse_run_config`.
    """
    _parse([f"--config={os.fspath(path)}"])  # types and keys; jsonargparse re-reads text inside overrides,
    return _build(RunConfig, _read_yaml(path))  # so the values themselves are taken from the file as they stand


def normalize_argv(argv: Sequence[str]) -> tuple[bool, list[str]]:
    """Bring command-line arguments into the one form that the parser sees.

    `--config` first, one `--key=value` each, lists as JSON, `--local_rank N` (some launchers append it; ranks are read
    from the environment) dropped.

    Returns:
        Whether `--print_config` was there, and the arguments.

    Raises:
        ConfigError: Unknown key, missing value, or a word that belongs to no key.
    """
    options = _split_options(argv)
    wants_config = any(option.key == "print_config" for option in options)
    first = [option for option in options if option.key in ("config", "help")]
    rest = [option for option in options if option.key not in ("config", "help", "print_config", "local_rank")]
    return wants_config, [_argument(option) for option in [*first, *rest]]


def _split_options(argv: Sequence[str]) -> list[_Option]:
    options: list[_Option] = []
    for word in argv:
        if word == "-h":
            word = "--help"
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            key = {"local-rank": "local_rank"}.get(name.rstrip("+"), name.rstrip("+"))
            options.append(_Option(key, name.endswith("+"), [value] if equals else []))
        elif options:
            options[-1].values.append(word)
        else:
            raise ConfigError(f"unexpected argument '{word}'; settings are written --key value, e.g. --loqt.rank 64")
    return options


def _argument(option: _Option) -> str:
    """Write one checked option as the single word that jsonargparse gets."""
    key, values = option.key, option.values
    if key == "help":
        return "--help"
    if key in setting_groups():
        raise ConfigError(f"'{key}' is a group of settings; write one of them, e.g. --{_first_setting(key)} VALUE")
    owner = "config" if key == "config" else owner_of(key)
    if owner is None:
        raise ConfigError(unknown_key_message(key))
    hint = str if key != owner or owner == "config" else setting_types()[owner]
    if not values:
        raise ConfigError(f"--{key} has no value; write {'a file' if key == 'config' else describe_type(hint)}")
    if get_origin(hint) is list:
        return f"--{key}{'+' if option.append else ''}={json.dumps(_list_items(values), ensure_ascii=False)}"
    if option.append:
        raise ConfigError(f"--{key}+ adds to a list, but {key} is {describe_type(hint)}; write --{key} VALUE")
    if get_origin(hint) is tuple and len(values) > 1:
        return f"--{key}=[{','.join(values)}]"
    if len(values) > 1:
        raise ConfigError(f"unexpected argument '{values[1]}' after --{key} {values[0]}; write one value")
    if takes_bool(hint) and values[0].lower() in WORDS:
        return f"--{key}={str(WORDS[values[0].lower()]).lower()}"
    return f"--{key}={values[0]}"


def _list_items(values: list[str]) -> list[Any]:
    """Read `[a, b]`, or else each word as one item: a glob such as [ab]*.txt is an item, not a list."""
    if len(values) == 1 and values[0].startswith("["):
        try:
            items = yaml.load(values[0], Loader=_Loader)
        except yaml.YAMLError:
            return values
        if isinstance(items, list):
            return items
    return list(values)


def _first_setting(group: str) -> str:
    return next(key for key in setting_types() if key.startswith(group + "."))


def _build_parser(prog: str, about: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE] [--key VALUE ...]",
        description=f"{about} Settings come from --config FILE, then from --key VALUE, which wins. A list takes "
        "several words, and --key+=VALUE adds to it.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file of settings; several: later wins.")
    parser.add_class_arguments(RunConfig)
    for action in parser._actions:
        if action.dest in setting_groups():
            action.help = SUPPRESS  # `--loqt FILE` would be a second way to say --config
        elif action.dest == "print_config":
            action.help, action.metavar, action.nargs = "Print the resulting settings as YAML and exit.", None, 0
    return parser


def _settings_of(argument: str) -> str | None:
    """A `--config=FILE` with the file's checked settings in its place; None if it is empty.

    jsonargparse has another idea of YAML than we have: it gets every value in the one form that both read alike.
    """
    path = expand_path(argument.partition("=")[2], "config")
    tree = _read_yaml(path)
    text = yaml.dump(tree, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**9, sort_keys=False)
    return f"--config={text}" if tree else None


def _read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Parse and check a YAML file of settings; an empty one is no settings at all."""
    name = os.fspath(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config file '{name}' does not exist; write --config FILE") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"config file '{name}' cannot be read: {reason_of(error)}") from None
    try:
        # whatever a reader of YAML can stumble over: dates that are none, numbers without end, 5000 brackets
        with explained(f"config file '{name}' is not YAML", kind=ConfigError):
            tree = yaml.load(text, Loader=_Loader)
        tree = {} if tree is None else tree
        with explained(f"config file '{name}' cannot be read", of=(RecursionError,), kind=ConfigError):
            check_yaml_keys(tree)
            return {key: _settled(value, key) for key, value in tree.items()}
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if name in message else f"{name}: {message}") from None


def _settled(value: Any, key: str) -> Any:
    """A value of a YAML tree whose on, off, yes and no are what the setting takes: true or false, or the word."""
    if isinstance(value, dict):
        return {name: _settled(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list):
        return [_settled(item, key) for item in value]
    if not isinstance(value, _Word):
        return value
    owner = owner_of(key)
    means_bool = owner is not None and (
        takes_bool(setting_types()[owner]) or get_origin(setting_types()[owner]) is dict
    )
    return WORDS[value.lower()] if means_bool else str(value)


def _build(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Construct a settings dataclass, innermost first; absent fields keep their defaults."""
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for item in fields(typing.cast(Any, cls)):
        if item.name not in values:
            continue
        hint, value = hints[item.name], values[item.name]
        if is_dataclass(hint):
            value = _build(typing.cast(type, hint), value, f"{prefix}{item.name}.")
        elif value is None and not accepts_none(hint):
            raise ConfigError(f"{prefix}{item.name} is null; write {describe_type(hint)}")
        elif get_origin(hint) is tuple:
            value = tuple(value)
        elif hint is float or (accepts_none(hint) and float in typing.get_args(hint) and value is not None):
            with explained(f"{prefix}{item.name} is no number", kind=ConfigError):
                value = float(value)
        arguments[item.name] = value
    return cls(**arguments)


def _plain(value: Any) -> Any:
    """Tuples as lists: YAML has no tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
