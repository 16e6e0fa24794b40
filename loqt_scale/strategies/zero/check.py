"""DeepSpeed's own check of a configuration, before anything is allocated.

DeepSpeed validates its configuration when it reads it, inside `deepspeed.initialize`: too late for us. So it reads the
configuration here first, and says in its own words what it does not take. Only a key at the top that it passes over is
ours to refuse.
(`engine.import_deepspeed` must have imported it: hence the import inside the function.)
"""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import ValidationError

from loqt_scale.errors import ConfigError, first_mistake, reason_of


def check_by_deepspeed(settings: dict[str, Any]) -> None:
    """Lets DeepSpeed read what it would get.

    Args:
        settings: The nested dict, ours and the file's.

    Raises:
        ConfigError: DeepSpeed refuses a value, or would pass over a key.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    noted = _Noted(settings)
    try:
        theirs = DeepSpeedConfig(noted)
        if theirs.zero_config.allgather_bucket_size % 2:  # looked at later
            raise ValueError("zero_optimization.allgather_bucket_size must be an even number")
    except ValidationError as error:
        raise ConfigError(f"DeepSpeed refuses these settings: {error.title}, {first_mistake(error)}") from error
    except Exception as error:
        raise ConfigError(f"DeepSpeed refuses these settings: {reason_of(error)}") from error
    for name in settings.keys() - noted.asked:
        nearest = difflib.get_close_matches(name, noted.asked, n=1)
        hint = f"did you mean '{nearest[0]}'?" if nearest else "leave it out"
        raise ConfigError(f"DeepSpeed has no key '{name}' at the top of its settings; {hint}")


class _Noted(dict[str, Any]):
    """A configuration that notes which of its keys are read. Blocks below it refuse unknown keys themselves."""

    def __init__(self, tree: dict[str, Any]) -> None:
        super().__init__(tree)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)
