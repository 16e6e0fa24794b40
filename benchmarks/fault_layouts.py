"""On how many ranks, and how, the campaign's runs are spread; and what a run is like to which nothing happens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A strategy on so many ranks."""

    strategy: str
    ranks: int
    settings: Mapping[str, str]

    @property
    def words(self) -> list[str]:
        """Its settings on the command line."""
        return [f"--parallel.strategy={self.strategy}", *(f"--{key}={value}" for key, value in self.settings.items())]


def _zero(stage: int, ranks: int) -> Layout:
    return Layout(strategy="zero", ranks=ranks, settings={"parallel.zero_stage": str(stage)})


LAYOUTS = {
    "single": Layout(strategy="single", ranks=1, settings={}),
    "fsdp x1": Layout(strategy="fsdp", ranks=1, settings={}),
    "zero 2 x1": _zero(2, 1),
    "ddp x2": Layout(strategy="ddp", ranks=2, settings={}),
    "fsdp x2": Layout(strategy="fsdp", ranks=2, settings={}),
    "zero 1 x2": _zero(1, 2),
    "zero 2 x2": _zero(2, 2),
    "zero 3 x2": _zero(3, 2),
}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A run that nothing happened to.

    Args:
        losses: Loss by step, 1 to its last.
        evaluations: Held-out loss by step.
        seconds: How long it took.
    """

    losses: dict[int, float]
    evaluations: dict[int, float]
    seconds: float
