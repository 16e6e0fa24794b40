"""The results file of benchmarks/quality.py: one JSON object a line, one line a run. Lines are only ever added.

A run that was done twice counts as it was the last time. A line that is not whole (its writer was killed) counts for
nothing.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quality_runs import Run, Scale, run_of

Record = dict[str, Any]
Family = tuple[str, tuple[tuple[str, str], ...]]
Group = tuple[Scale, str, "Table"]  # a scale, a text's key, and what may be compared


class Results:
    """What is known by now.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[str, Record] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
            try:
                record = json.loads(line)
                self._records[run_of(record).key(record["text"])] = record
            except (ValueError, KeyError, TypeError):
                print(f"{path}, line {number}: not a whole result; it is left out", file=sys.stderr)

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def add(self, record: Record) -> None:
        """Keeps a result, in the file first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            torn = file.tell() and (file.seek(-1, 2), file.read(1))[1] != b"\n"
            file.write((b"\n" if torn else b"") + json.dumps(record).encode() + b"\n")
        self._records[run_of(record).key(record["text"])] = record

    def of(self, scale: Scale, text: str) -> Table:
        """The results that may be compared: one scale, one text."""
        pairs = [(run_of(record), record) for record in self if record["text"] == text]
        return Table([(run, record) for run, record in pairs if run.scale == scale])

    def tables(self) -> list[Group]:
        """All comparable groups."""
        groups = dict.fromkeys((run_of(record).scale, record["text"]) for record in self)
        return [(scale, text, self.of(scale, text)) for scale, text in groups]


class Table:
    """Results of one scale and one text, by family.

    Args:
        pairs: Runs with their results.
    """

    def __init__(self, pairs: list[tuple[Run, Record]]) -> None:
        self.records = [record for _, record in pairs]
        self.by_family: dict[Family, list[tuple[Run, Record]]] = defaultdict(list)
        for run, record in pairs:
            self.by_family[run.family].append((run, record))

    def first_seed(self, family: Family) -> list[tuple[Run, float]]:
        """The family's runs from its lowest seed, with their nats; best first, diverged ones (infinite) last."""
        pairs = self.by_family.get(family, [])
        lowest = min((run.seed for run, _ in pairs), default=0)
        found = [(run, nats_of(record)) for run, record in pairs if run.seed == lowest]
        return sorted(found, key=lambda pair: pair[1])

    def best(self, family: Family) -> Best | None:
        """The family at the rates that were best from its lowest seed; None if all diverged or there is none."""
        ranked = self.first_seed(family)
        if not ranked or math.isinf(ranked[0][1]):
            return None
        run, _ = ranked[0]
        same = {other.seed: record for other, record in self.by_family[family] if _rates(other) == _rates(run)}
        beside = {own.lr for own, _ in ranked if own.rest == run.rest}
        rests = {own.rest for own, _ in ranked if own.lr == run.lr}
        edges = {"at_edge": is_edge(run.lr, beside), "rest_at_edge": is_edge(run.rest, rests)}
        return Best(run, same, tried=len(ranked), rates=len({own.lr for own, _ in ranked}), **edges)

    def every_best(self) -> list[Best]:
        """One a family, lowest perplexity first."""
        found = [best for family in self.by_family if (best := self.best(family)) is not None]
        return sorted(found, key=lambda best: best.nats)


def is_edge(rate: float, tried: set[float]) -> bool:
    """Whether a rate is the lowest or highest of those tried, or one of fewer than three."""
    return len(tried) < 3 or rate in (min(tried), max(tried))


@dataclass(frozen=True)
class Best:
    """A family at its best rates.

    Args:
        run: From the lowest seed.
        by_seed: Results at these rates by seed.
        tried: Pairs of rates that were tried.
        rates: Of them, different ones of the linears: three or more are a sweep.
        at_edge: Whether its `lr` is the lowest or highest of those tried at this `rest`: a better one may lie beyond.
        rest_at_edge: Whether its `rest` is, of those tried at this `lr`.
    """

    run: Run
    by_seed: dict[int, Record]
    tried: int
    rates: int
    at_edge: bool
    rest_at_edge: bool

    @property
    def nats(self) -> float:
        """Mean over seeds; infinite if one diverged."""
        return sum(nats_of(record) for record in self.by_seed.values()) / len(self.by_seed)

    @property
    def record(self) -> Record:
        """The result of the lowest seed."""
        return self.by_seed[self.run.seed]

    def over(self, other: Best) -> list[float]:
        """Perplexity over another family's, seed by seed where both have one."""
        shared = sorted(self.by_seed.keys() & other.by_seed.keys())
        return [math.exp(nats_of(self.by_seed[seed]) - nats_of(other.by_seed[seed])) for seed in shared]


def nats_of(record: Record) -> float:
    """Held-out nats a token; infinite for a run that diverged."""
    return math.inf if record["nats"] is None else float(record["nats"])


def bytes_of(record: Record) -> int:
    """Weights, gradients and optimizer states."""
    return int(record["weight_bytes"] + record["gradient_bytes"] + record["state_bytes"])


def _rates(run: Run) -> tuple[float, float]:
    return run.lr, run.rest
