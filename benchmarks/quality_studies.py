"""What benchmarks/quality.py compares: studies by name. Each says, from what is known by now, what to do next.

A study is asked again whenever a worker is idle, until it has nothing new: so a sweep can go on where the best rate was
the last of its grid, and finalists can be chosen from what the sweep has found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain, zip_longest

from quality_results import Table
from quality_runs import Run, Scale, variant_of, with_seed

Study = Callable[[Scale, Table], list[Run]]

REST = 5e-3  # rate of embeddings, norms and head from which a sweep starts
REST_GRID = (2.5e-3, 1e-2)  # tried at the best rate of the linears
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
    """Rates of the linears, further ones while the best is the last of them; then rates of the rest at the best."""
    families = [
        [Run(method=method, scale=scale, lr=lr, rest=REST, variant=variant_of(variant, scale)) for lr in rates]
        for method, variant, rates in swept(scale)
    ]
    return in_turns([one_sweep(grid, known) for grid in families])


def one_sweep(grid: list[Run], known: Table) -> list[Run]:
    """A family's runs so far and next.

    Args:
        grid: Its first runs: rates of the linears, all with one rate of the rest.
        known: What is known.
    """
    start = grid[0]
    lrs = {run.lr: nats for run, nats in known.first_seed(start.family) if run.rest == start.rest}
    if any(run.lr not in lrs for run in grid):
        return grid
    if (lr := beyond(lrs, start.lr)) is not None:
        return [*grid, replace(start, lr=lr)]
    best = replace(start, lr=lowest(lrs))
    rests = {run.rest: nats for run, nats in known.first_seed(start.family) if run.lr == best.lr}
    if any(rest not in rests for rest in REST_GRID):
        return [replace(best, rest=rest) for rest in REST_GRID]
    rest = beyond(rests, start.rest)
    return [] if rest is None else [replace(best, rest=rest)]


def beyond(found: dict[float, float], first: float) -> float | None:
    """The rate to try next if the best is the lowest or highest that was tried; None if it lies between others.

    Args:
        found: Nats by rate; infinite where a run diverged.
        first: Where the sweep began: it does not go further than `FURTHEST` times from there.
    """
    best = lowest(found)
    step = 0.5 if best == min(found) else 2.0 if best == max(found) else None
    if step is None:
        return None
    rate = float(f"{best * step:.6g}")
    return rate if 1 / FURTHEST <= rate / first <= FURTHEST else None


def lowest(found: dict[float, float]) -> float:
    """The rate with the fewest nats; of equal ones the lowest."""
    return min(found, key=lambda rate: (found[rate], rate))


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
