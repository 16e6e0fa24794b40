"""The table of the campaign's faults, by kind and variant.

A fault is a function of a `Bench`: it does something to a run, and raises `Bad` if what follows is not what should.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fault_bench import Bench

Fault = Callable[[Bench], None]
ANY, ALONE, SEVERAL = "any", "alone", "several"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way in which a kind of fault happens.

    Args:
        kind: What the table counts it under.
        name: What is done.
        run: Does it.
        where: On any layout, on one process only, on several only.
        known: It ended badly once, and is tried in every run of the fast tests.
    """

    kind: str
    name: str
    run: Fault
    where: str
    known: bool


FAULTS: list[Variant] = []


def fault(kind: str, name: str, where: str = ANY, *, known: bool = False) -> Callable[[Fault], Fault]:
    """Puts a function into the table; see `Variant`."""

    def put(run: Fault) -> Fault:
        FAULTS.append(Variant(kind=kind, name=name, run=run, where=where, known=known))
        return run

    return put
