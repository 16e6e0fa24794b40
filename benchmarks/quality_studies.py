"""What benchmarks/quality.py compares: studies by name. Each says, from what is known by now, what to do next.

A study is asked again whenever a worker is idle, until it has nothing new: so a sweep can go on where the best rate was
the last of its grid, and finalists can be chosen from what the sweep has found.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, zip_longest

from quality_results import Table
from quality_runs import Run, Scale, variant_of, with_seed

Study = Callable[[Scale, Table], list[Run]]

REST = 5e-3  # rate of embeddings, norms and head from which a sweep starts
SEEDS = (0, 1, 2)
FURTHEST = 16.0


def swept(scale: Scale) -> list[tuple[str, dict[str, str], tuple[float, ...]]]:
    """(method, variant, rates of the linears, the likeliest first) of every family that gets a sweep of its own."""
    eighth = scale.rank // 2  # of the hidden size, of which the scale's rank is a quarter
    three, half, six = ({"loqt.rank": str(n * eighth)} for n in (3, 4, 6))
    muon = {"optim.name": "muon"}
    lean = {"optim.states": "int8", "model.dtype": "bfloat16", "model.trained_dtype": "bfloat16", **muon}
    return [
        ("adamw", {}, (1e-3, 2e-3, 5e-4)),
        ("loqt", {}, (5e-3, 2.5e-3, 1e-2)),
        ("muon", {}, (2e-3, 4e-3, 1e-3)),
        ("loqt", {**half, **muon}, (5e-3, 1e-2, 2.5e-3)),
        ("galore", {}, (1e-2, 2e-2, 5e-3)),
        ("apollo", {}, (1e-2, 2e-2, 5e-3)),
        ("loqt", {**half, **lean}, (5e-3, 1e-2, 2.5e-3)),
        ("loqt", {**six, **lean}, (5e-3, 1e-2, 2.5e-3)),
        ("loqt", {**three, **muon}, (5e-3, 1e-2, 2.5e-3)),
        ("loqt", half, (2.5e-3, 5e-3, 1.25e-3)),
        ("loqt", muon, (5e-3, 1e-2, 2.5e-3)),
        ("loqt", {"loqt.quantization.weight": "none", "loqt.quantization.projection": "none"}, (5e-3, 2.5e-3, 1e-2)),
    ]


def sweep(scale: Scale, known: Table) -> list[Run]:
    """Rates of the linears, then both rates in turns, until the best pair lies between others in either direction."""
    families = [
        [Run(method=method, scale=scale, lr=lr, rest=REST, variant=variant_of(variant, scale)) for lr in rates]
        for method, variant, rates in swept(scale)
    ]
    return in_turns([one_sweep(grid, known) for grid in families])


def one_sweep(grid: list[Run], known: Table) -> list[Run]:
    """A family's runs so far and next: a descent over pairs of rates, by factors of two of one of them at a time.

    The rates hang together: at another rate of the rest another one of the linears may be best.

    Args:
        grid: Its first runs: rates of the linears, all with one rate of the rest.
        known: What is known.
    """
    start = grid[0]
    found = {(run.lr, run.rest): nats for run, nats in known.first_seed(start.family)}
    if any((run.lr, run.rest) not in found for run in grid):
        return grid
    lr, rest = min(found, key=lambda pair: (found[pair], pair))
    beside = [(near, rest) for near in neighbours(lr, start.lr)]
    if all(pair in found for pair in beside) and found[lr, rest] < math.inf:
        beside = [(lr, near) for near in neighbours(rest, start.rest)]
    return [replace(start, lr=lr, rest=rest) for lr, rest in beside]


def neighbours(rate: float, first: float) -> list[float]:
    """Twice the rate and half of it, no further than `FURTHEST` times from the first one tried."""
    each = (float(f"{rate * factor:.6g}") for factor in (2.0, 0.5))
    return [near for near in each if 1 / FURTHEST <= near / first <= FURTHEST]


def finalists(scale: Scale, known: Table) -> list[Run]:
    """Every family that had a sweep, at its best rates, from three seeds."""
    return in_turns([[with_seed(best.run, seed) for seed in SEEDS] for best in known.every_best() if best.rates >= 3])


ABLATIONS: list[dict[str, str]] = [
    {"loqt.merge.gap": "200"},
    {"loqt.merge.gap": "50"},
    {"loqt.scale": "1.0"},
    {"loqt.scale": "0.25"},
    {"loqt.merge.optimizer_state": "reset"},
    {"loqt.merge.compensation_rounds": "0"},
    {"loqt.merge.last_step_fraction": "0.8"},
    {"loqt.quantization.weight": "int8"},
    {"loqt.quantization.weight": "nf4_double", "loqt.quantization.projection": "nf4_double"},
    {"optim.states": "int8"},
    {"model.trained_dtype": "bfloat16"},
]


def ablations(scale: Scale, known: Table) -> list[Run]:
    """One setting at a time away from the best LoQT family that had a sweep, at its best rates."""
    best = [best.run for best in known.every_best() if best.run.method == "loqt" and best.rates >= 3]
    base = with_seed(best[0], 0) if best else Run(method="loqt", scale=scale, lr=5e-3, rest=REST)
    changed = [variant_of(dict(base.variant) | own, scale) for own in ABLATIONS]
    return [base, *(replace(base, variant=variant) for variant in changed if variant != base.variant)]


def in_turns(rows: list[list[Run]]) -> list[Run]:
    """The first of each, then the second of each, and so on."""
    return [run for run in chain.from_iterable(zip_longest(*rows)) if run is not None]


STUDIES: dict[str, Study] = {"sweep": sweep, "finalists": finalists, "ablations": ablations}
