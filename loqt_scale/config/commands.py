"""What `loqt-scale export`, `generate` and `plan` take on the command line (`train` and `eval`: a run's settings)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar, cast, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from loqt_scale.config.check import PATH, check_values, require
from loqt_scale.config.choices import Device, Dtype, ExportFormat
from loqt_scale.config.keys import plain_message
from loqt_scale.config.sizes import parse_size
from loqt_scale.errors import ConfigError, explained

T = TypeVar("T")

TEMPERATURES = 1e-4, 1e4  # below, logits have no room in float32 once they are divided by it


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a checkpoint as a plain Hugging Face model.

    Args:
        checkpoint: A checkpoint's folder, or a run's for its latest.
        out: Folder to write; must not exist yet.
        format: dense = merged weights, which need nothing but transformers; nf4 = the 4-bit base as bitsandbytes reads
            it and the low-rank factors as a LoRA adapter (PEFT), nothing merged.
        dtype: Dtype of what is written dense.
        max_shard_size: Size of a file, and about the memory that the export takes, e.g. 500MB or 2GB.
    """

    checkpoint: str = field(metadata=PATH)
    out: str = field(metadata=PATH)
    format: ExportFormat = "dense"
    dtype: Dtype = "bfloat16"
    max_shard_size: str = "2GB"

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Continue a text with a trained model.

    Args:
        checkpoint: A checkpoint's folder, a run's for its latest, or an exported model's.
        prompt: The text to go on from; empty = the start of a document.
        max_new_tokens: Tokens to generate at most.
        temperature: 0 = always the likeliest token; 1 = the model's own distribution.
        top_p: Sample from the likeliest tokens that together have this probability.
        seed: Seed of the sampling.
        device: auto = cuda if there is one, else cpu.
    """

    checkpoint: str = field(metadata=PATH)
    prompt: str = ""
    max_new_tokens: int = 100
    temperature: float = 0.8
    top_p: float = 1.0
    seed: int = 0
    device: Device = "auto"

    def __post_init__(self) -> None:
        temperature, low, high = self.temperature, *TEMPERATURES
        require(
            temperature == 0.0 or low <= temperature <= high,
            f"temperature is {temperature}; write 0 (the likeliest token) or {low} to {high}",
        )
        check_values(self)
        require(self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}; write 1 or more")
        require(0.0 < self.top_p <= 1.0, f"top_p is {self.top_p}; write a number in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a run needs, before it starts; the settings of `train` follow.

    Args:
        gpus: Ranks of the run.
        gpu_memory: What a GPU has, e.g. 24GB (10^9 bytes) or 24GiB (2^30).
        vocab_size: Rows of the embedding. Default: the tokenizer's.
        gpu: Name of the GPU, e.g. H100: then step time, tokens/s and MFU are planned, too.
        interconnect: Name of what connects them, or their nodes if there are several. Default: the GPU's own.
        devices: YAML file of GPUs, interconnects and assumptions in place of the package's own.
        tokens: Tokens of the whole run, e.g. 20e9, for its days. Default: those of its steps.
    """

    gpus: int = 1
    gpu_memory: str | None = None
    vocab_size: int | None = None
    gpu: str | None = None
    interconnect: str | None = None
    devices: str | None = field(default=None, metadata=PATH)
    tokens: float | None = None

    def __post_init__(self) -> None:
        check_values(self)
        tokens = self.tokens
        require(tokens is None or tokens >= 1, f"tokens is {tokens}; write 1 or more, e.g. 20e9")
        for name in ("interconnect", "devices", "tokens"):
            unused = self.gpu is None and getattr(self, name) is not None
            require(not unused, f"{name} is {getattr(self, name)}, but there is no gpu; write --gpu H100, say")
        require(1 <= self.gpus <= 2**24, f"gpus is {self.gpus}; write 1 to {2**24}")
        rows = self.vocab_size
        require(rows is None or 1 <= rows <= 2**31, f"vocab_size is {rows}; write 1 to {2**31}")
        if self.gpu_memory is not None:
            parse_size(self.gpu_memory)


def parse_options(cls: type[T], argv: Sequence[str], prog: str) -> T:
    """Builds a dataclass of options from `--name value` words.

    Raises:
        ConfigError: An unknown or missing option, or a value that cannot work.
        SystemExit: With status 0, after `--help` has printed.
    """
    known = [item.name for item in fields(cast(Any, cls))]
    given = [word[2:].partition("=")[0] for word in argv if word.startswith("--")]
    for name in given:
        if name not in (*known, "help"):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '--{near[0]}'?" if near else f"write one of --{', --'.join(known)}"
            raise ConfigError(f"unknown option '--{name}'; {hint}")
    required = [item.name for item in fields(cast(Any, cls)) if item.default is MISSING]
    missing = [name for name in required if name not in given]
    if missing and "help" not in given and "-h" not in argv:
        raise ConfigError(f"no --{missing[0]}; write {' '.join(f'--{name} {name.upper()}' for name in required)}")
    parser = ArgumentParser(prog=prog, description=(cls.__doc__ or "").partition("\n")[0], exit_on_error=False)
    parser.add_class_arguments(cls)
    with explained("the options cannot be read", kind=ConfigError):
        try:
            values = parser.parse_args(list(argv)).as_dict()
        except ArgumentError as error:
            raise ConfigError(plain_message(str(error), get_type_hints(cls))) from None
    return cls(**values)


def take_options(cls: type[Any], argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts a line into the words of a dataclass's options and the others; `--gpu-memory` may stand for its field.

    Returns:
        The options as `--name=value`, and the rest.
    """
    names = {item.name for item in fields(cls)}
    ours: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        key, equals, value = word.partition("=")
        name = key.removeprefix("--").replace("-", "_")
        if not key.startswith("--") or name not in names:
            rest.append(word)
        else:
            ours.append(f"--{name}={value if equals else next(words, '')}")
    return ours, rest


@dataclass(frozen=True)
class _Saved:
    checkpoint: str = field(default="", metadata=PATH)

    def __post_init__(self) -> None:
        check_values(self)


def split_checkpoint(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Takes `--checkpoint PATH` out of a line of run settings; returns the path and the rest.

    Raises:
        ConfigError: It is missing.
    """
    found, words = take_options(_Saved, argv)
    path = found[-1].partition("=")[2] if found else ""
    if not path:
        raise ConfigError(
            "no --checkpoint; write --checkpoint with a checkpoint's, a run's or an exported model's folder"
        )
    return _Saved(path).checkpoint, words
