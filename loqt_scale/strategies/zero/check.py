"""DeepSpeed's own check of a configuration, before anything is allocated, in one line that names the key.

DeepSpeed validates its configuration when it reads it, inside `deepspeed.initialize`: too late for us. At the top level
and in several blocks it passes over keys that it does not know. So it reads the configuration here first, from a dict
that notes which keys it asks for: names, types and ranges are those of the DeepSpeed that is installed.
(`engine.import_deepspeed` must have imported it: hence the imports inside functions.)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from loqt_scale.errors import ConfigError, reason_of
from loqt_scale.strategies.zero.json import nested, shown


def check_by_deepspeed(ours: Mapping[str, Any], file: Mapping[str, Any]) -> None:
    """Lets DeepSpeed read what it would get.

    Args:
        ours: Dotted keys and values that this package fills in.
        file: Those of the user's file, which win.

    Raises:
        ConfigError: DeepSpeed refuses a value, or does not know a key.
    """
    whole = _Notes(nested({**ours, **file}))
    error = _refusal(whole)
    for key, value in file.items():
        if error is None and (unknown := whole.passed_over(key)):
            raise ConfigError(_unknown(unknown, whole.known()))
        alone = _refusal(nested({**ours, key: value})) if error and not key.startswith("scheduler.") else None
        if alone is not None:
            raise ConfigError(_message(key, value, alone)) from alone
    if error is not None:
        raise ConfigError(f"DeepSpeed refuses these settings: {reason_of(error)}") from error


class _Notes(dict[str, Any]):
    """A configuration, or a block of it, that notes which keys are asked for.

    What lies below blocks DeepSpeed reads with pydantic, which knows its keys.
    """

    def __init__(self, tree: Mapping[str, Any], depth: int = 2) -> None:
        blocks = {key: _Notes(value, 1) for key, value in tree.items() if isinstance(value, dict) and depth > 1}
        super().__init__({**tree, **blocks})
        self.asked: set[str] = set()

    def known(self) -> set[str]:
        """Dotted keys that were asked for."""
        blocks = ((name, block) for name, block in self.items() if isinstance(block, _Notes))
        return self.asked | {f"{name}.{key}" for name, block in blocks for key in block.asked}

    def passed_over(self, key: str) -> str:
        """The part of a dotted key that nobody asked for: of the top, or of a block of which others were asked for."""
        name, *below = key.split(".")
        block = super().get(name)
        if name in self.asked and below and isinstance(block, _Notes) and block.asked:
            return "" if below[0] in block.asked else f"{name}.{below[0]}"
        return "" if name in self.asked else name

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: Any) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self) -> Any:
        return self  # so that `key in block.keys()` asks

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # as it is defined here, `**block` goes through `keys` and `[]`


def _refusal(settings: dict[str, Any]) -> Exception | None:
    """What DeepSpeed says on reading, and on what it takes up later: dtypes, an even number, the scheduler."""
    import torch
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum

    try:
        theirs = DeepSpeedConfig(settings)
        for name in ("grad_accum_dtype", "param_dtype", "buffer_dtype"):
            DtypeEnum(getattr(theirs, name, None) or "fp32")
        if theirs.zero_config.allgather_bucket_size % 2:
            raise ValueError("Input should be an even number")
        _ = 1 % (1 if theirs.steps_per_print is None else theirs.steps_per_print)
        if theirs.scheduler_name is not None:
            groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)]
            getattr(lr_schedules, theirs.scheduler_name)(torch.optim.AdamW(groups), **theirs.scheduler_params)
    except Exception as error:
        return error
    return None


def _message(key: str, value: Any, error: Exception) -> str:
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return f"{key} is {shown(value)}, which DeepSpeed refuses: {reason_of(error)}"
    first = error.errors()[0]
    if first["type"] != "extra_forbidden":
        return f"{key} is {shown(value)}, which DeepSpeed refuses: {first['msg']}"
    *blocks, name = map(str, first["loc"])
    above = f"{key}.".partition(f"{name}.")[0]
    return _unknown(above + name, [above + field for field in _fields(error.title, blocks)])


def _fields(model_name: str, blocks: list[str]) -> list[str]:
    """Names that one of DeepSpeed's pydantic models knows, or a block within it."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    model = next(model for model in DeepSpeedConfigModel.__subclasses__() if model.__name__ == model_name)
    for block in blocks:
        kind = model.model_fields[block].annotation
        model = next(each for each in (kind, *get_args(kind)) if hasattr(each, "model_fields"))
    return [field.alias or name for name, field in model.model_fields.items()]


def _unknown(key: str, known: Iterable[str]) -> str:
    """Message with the key of this name that stands elsewhere, or one beside it that is spelt alike."""
    block, _, name = key.rpartition(".")
    beside = {leaf: other for other in known for above, _, leaf in [other.rpartition(".")] if above == block}
    nearest = [beside[leaf] for leaf in difflib.get_close_matches(name, beside, n=1)]
    if key in _fields("DeepSpeedZeroConfig", []):
        nearest = [f"zero_optimization.{key}"]
    return f"DeepSpeed has no key '{key}'; " + (f"did you mean '{nearest[0]}'?" if nearest else "leave it out")
