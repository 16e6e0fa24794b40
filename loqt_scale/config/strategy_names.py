"""The strategies that `parallel.strategy` may name: this package's own, and those of others, found without torch.

Others declare an entry point, or register in process: see `strategies.registry`, which also loads them.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import get_args

from loqt_scale.config.check import require
from loqt_scale.config.choices import StrategyName

ENTRY_POINTS = "loqt_scale.strategies"
_registered: set[str] = set()


def add_strategy_name(name: str) -> None:
    """Makes a name known in this process."""
    _registered.add(name)


def installed_strategy(name: str) -> EntryPoint | None:
    """Where an installed package says that the strategy of this name is; not loaded."""
    return next(iter(entry_points(group=ENTRY_POINTS, name=name)), None)


def check_strategy_name(name: str) -> None:
    """Raises ConfigError unless there is a strategy of this name."""
    own = get_args(StrategyName)
    if name in own or name in _registered or installed_strategy(name) is not None:
        return
    others = _registered.union(entry.name for entry in entry_points(group=ENTRY_POINTS)).difference(own)
    require(False, f"parallel.strategy is '{name}'; write one of {', '.join((*own, *sorted(others)))}")
