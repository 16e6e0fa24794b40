"""Strategies by name: this package's own, and those of others.

A third party's strategy is found by `parallel.strategy: NAME` in one of two ways:

installed    its package declares an entry point (in pyproject.toml), which is loaded when the name is asked for:

                 [project.entry-points."loqt_scale.strategies"]
                 NAME = "its_package.its_module:ITS_KIND"

in process   a program calls `register_strategy(ITS_KIND)` before it reads settings

where ITS_KIND is a `StrategyKind`. docs/strategies.md has an example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed.distributed_c10d import Store

from loqt_scale.config import ParallelConfig, RunConfig
from loqt_scale.config.strategy_names import add_strategy_name, check_strategy_name, installed_strategy
from loqt_scale.errors import UserError, one_line
from loqt_scale.strategies.base import DTYPES, Strategy


@dataclass(frozen=True, kw_only=True)
class StrategyRequest:
    """What a strategy is made from.

    Args:
        config: The run. Most strategies need no more than `parallel` and `compute_dtype`.
        device: This rank's.
        store: What only this job's ranks see; None: the launcher's.
    """

    config: RunConfig
    device: torch.device
    store: Store | None = None

    @property
    def parallel(self) -> ParallelConfig:
        """The settings of strategies; `options` are those of a third party's."""
        return self.config.parallel

    @property
    def compute_dtype(self) -> torch.dtype:
        """float32, or bfloat16 for mixed precision."""
        return DTYPES[self.config.model.dtype]


@dataclass(frozen=True, kw_only=True)
class StrategyKind:
    """A strategy that settings can name.

    Args:
        name: What `parallel.strategy` says.
        create: Makes the strategy and joins its ranks. Every rank. It refuses settings by a ConfigError, before it has
            joined anything.
        launched: Whether it wants the ranks of a launcher; if not, it is for one process.
        only_trains: Whether it cannot hold a model without an optimizer, for `loqt-scale eval`.
        takes_options: Whether it reads `parallel.options`.
    """

    name: str
    create: Callable[[StrategyRequest], Strategy]
    launched: bool = True
    only_trains: bool = False
    takes_options: bool = False


_kinds: dict[str, StrategyKind] = {}


def register_strategy(kind: StrategyKind) -> None:
    """Makes a strategy known by its name, in this process.

    Raises:
        ValueError: Another strategy has the name.
    """
    if kind.name == "auto" or _kinds.setdefault(kind.name, kind) is not kind:
        raise ValueError(f"there is a strategy '{kind.name}' already; give yours another name")
    add_strategy_name(kind.name)


def find_strategy(name: str) -> StrategyKind:
    """The strategy that is registered or installed under a name.

    Raises:
        ConfigError: There is none.
        UserError: It is installed, but cannot be loaded.
    """
    check_strategy_name(name)
    if name not in _kinds:
        register_strategy(_load(name))
    return _kinds[name]


def _load(name: str) -> StrategyKind:
    entry = installed_strategy(name)
    assert entry is not None
    package = entry.dist.name if entry.dist is not None else "a package"
    try:
        kind = entry.load()
    except Exception as error:  # a stranger's module may raise anything
        reason = f"{package}'s {entry.value} cannot be loaded: {one_line(error)}"
        raise UserError(f"parallel.strategy is '{name}', but {reason}") from error
    if not isinstance(kind, StrategyKind) or kind.name != name:
        raise UserError(f"parallel.strategy is '{name}', but {package}'s {entry.value} is no StrategyKind of that name")
    return kind
