"""Hundreds of runs that something happens to: is any step lost or done twice, and does each end in words?

A case is a fault (a kind and a variant of it: `fault_table`) on a strategy and a number of ranks, with all its choices
drawn from the seed and the case's number, so that it can be done again alone. After the fault the same command is given
until the run is over, and everything is compared with a run that nothing happened to (`fault_bench`).

    python benchmarks/faults.py                     # 340 cases
    python benchmarks/faults.py --quick             # about a minute, one process
    python benchmarks/faults.py --each --layouts single      # every variant once
    python benchmarks/faults.py --case 17           # one of them again, with what was done

Each case's result is a line of --results as soon as it is known; cases that are in that file already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

from common import commit, publish, table
from fault_bench import Bad, Bench, unbroken
from fault_layouts import LAYOUTS, Reference
from fault_table import ALONE, ANY, FAULTS, SEVERAL, Variant
from golden import corpus
from ranks import warm_up

# In this order: a case's number chooses among them.
for _name in ("fault_signals", "fault_disks", "fault_restarts", "fault_places", "fault_files", "fault_words"):
    import_module(_name)  # puts its faults into the table

SHARES = {"kill -9": 3, "told to stop": 2, "full disk": 2, "second job": 2, "going back": 2, "forged manifest": 2}
KNOWN_FROM = 10_000  # numbers of the known faults
PLACES = {ANY: "single", ALONE: "single", SEVERAL: "ddp x2"}
TITLE = "Faults: what becomes of runs that something happens to"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A fault on a layout."""

    number: int
    seed: int
    kind: str
    variant: str
    layout: str

    @property
    def fault(self) -> Variant:
        """Its function."""
        return next(fault for fault in FAULTS if (fault.kind, fault.name) == (self.kind, self.variant))


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a case: `bad` is empty if all was well."""

    case: Case
    bad: str
    story: list[str]
    seconds: float


def draw(number: int, seed: int, layouts: Sequence[str], kinds: Sequence[str]) -> Case:
    """The case with this number: kinds in turn, so that each has its share; the rest by chance."""
    rng = random.Random(f"{seed}/{number}")
    kind = kinds[number % len(kinds)]
    variant = rng.choice([fault for fault in FAULTS if fault.kind == kind and allowed(fault, layouts)])
    layout = rng.choice(allowed(variant, layouts))
    return Case(number=number, seed=seed, kind=kind, variant=variant.name, layout=layout)


def allowed(fault: Variant, layouts: Sequence[str]) -> list[str]:
    """On which of these layouts a fault can happen."""
    several = {ALONE: (False,), SEVERAL: (True,)}.get(fault.where, (False, True))
    return [name for name in layouts if (LAYOUTS[name].ranks > 1) in several]


def known_faults(seed: int) -> list[Case]:
    """Each fault that ended badly once, on one process, or on two where it takes several."""
    found = enumerate(fault for fault in FAULTS if fault.known)
    return [
        Case(number=KNOWN_FROM + index, seed=seed, kind=fault.kind, variant=fault.name, layout=PLACES[fault.where])
        for index, fault in found
    ]


def every_variant(seed: int, layouts: Sequence[str]) -> list[Case]:
    """Each variant once, on the first of the layouts that will do."""
    found = [(fault, allowed(fault, layouts)) for fault in FAULTS]
    return [
        Case(number=number, seed=seed, kind=fault.kind, variant=fault.name, layout=places[0])
        for number, (fault, places) in enumerate((fault, places) for fault, places in found if places)
    ]


def attempt(case: Case, root: Path, text: Path, reference: Reference, keep: bool) -> Result:
    """Tries a case in a folder of its own, which is removed afterwards unless it is to be kept."""
    folder, began = Path(tempfile.mkdtemp(prefix=f"case-{case.number}-", dir=root)), time.monotonic()
    bench = Bench(folder, LAYOUTS[case.layout], text, random.Random(f"{case.seed}/{case.number}/run"), reference)
    try:
        bad = ""
        case.fault.run(bench)
    except Bad as error:
        bad = str(error)
    except Exception:  # of the campaign itself, or of a case that met what nobody had thought of
        bad = "the case itself failed: " + " / ".join(traceback.format_exc().splitlines()[-3:])
    finally:
        bench.close()
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    return Result(case=case, bad=bad, story=bench.story, seconds=round(time.monotonic() - began, 1))


def references(layouts: Iterable[str], root: Path, text: Path) -> dict[str, Reference]:
    """The unbroken run of each layout."""
    made = {}
    for name in layouts:
        folder = Path(tempfile.mkdtemp(prefix="unbroken-", dir=root))
        made[name] = unbroken(folder, LAYOUTS[name], text)
        print(f"without faults, {name}: {len(made[name].losses)} steps in {made[name].seconds:.1f} s", flush=True)
    return made


class Campaign:
    """Cases, one after the other in each of a few workers; results as they come.

    Args:
        root: Folder for everything; removed afterwards by its owner.
        results: File that takes a line a case.
        keep: Whether the cases' folders stay.
    """

    def __init__(self, root: Path, results: Path, *, keep: bool) -> None:
        self.root, self.results, self.keep = root, results, keep
        self.text, self.commit = corpus(root), commit()

    def known(self) -> dict[tuple[int, int, str], dict[str, object]]:
        """Results of this commit that are in the file already, by seed, number and kind."""
        rows = map(json.loads, self.results.read_text().splitlines() if self.results.exists() else [])
        return {(row["seed"], row["number"], row["kind"]): row for row in rows if row["commit"] == self.commit}

    def run(self, cases: Sequence[Case], workers: int) -> None:
        """Tries the cases that have no result yet."""
        known = self.known()
        missing = [case for case in cases if (case.seed, case.number, case.kind) not in known]
        made = references(dict.fromkeys(case.layout for case in missing), self.root, self.text)
        context = get_context("fork")
        processes = [
            context.Process(target=self._work, args=(missing[index::workers], made)) for index in range(workers)
        ]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join()
        finally:
            for process in processes:
                process.terminate()  # nothing, unless this one is told to stop
                process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit("a worker died; the same command goes on with the cases that are left")

    def _work(self, cases: Sequence[Case], made: dict[str, Reference]) -> None:
        for case in cases:
            self._keep(attempt(case, self.root, self.text, made[case.layout], self.keep))

    def _keep(self, result: Result) -> None:
        row = {
            "commit": self.commit,
            **asdict(result.case),
            "bad": result.bad,
            "seconds": result.seconds,
            "story": result.story,
        }
        descriptor = os.open(self.results, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.write(descriptor, (json.dumps(row, ensure_ascii=False) + "\n").encode())  # one write: workers do not mix
        os.close(descriptor)
        show(result)


def show(result: Result) -> None:
    """A line for people; with the whole story if it went wrong."""
    case, verdict = result.case, "BAD" if result.bad else "ok"
    where = f"{case.number:4} {verdict:3} {result.seconds:5.1f} s  {case.layout:9}"
    print(f"{where} {case.kind}: {case.variant}", flush=True)
    if result.bad:
        print(f"         {result.bad}\n         ({'; '.join(result.story)})", flush=True)


def summary(rows: Sequence[dict[str, object]]) -> str:
    """A table: kinds by layouts, survived of tried; and what went wrong."""
    layouts = [name for name in LAYOUTS if any(row["layout"] == name for row in rows)]
    lines = []
    for kind in dict.fromkeys(fault.kind for fault in FAULTS):
        of_kind = [row for row in rows if row["kind"] == kind]
        cells = [cell([row for row in of_kind if row["layout"] == name]) for name in layouts]
        bad = sum(bool(row["bad"]) for row in of_kind)
        if of_kind:
            lines.append([kind, *cells, len(of_kind), len(of_kind) - bad, bad])
    bad = sum(bool(row["bad"]) for row in rows)
    cells = [cell([row for row in rows if row["layout"] == name]) for name in layouts]
    lines.append(["**all**", *cells, len(rows), len(rows) - bad, bad])
    return table(["fault", *layouts, "tried", "survived", "bad"], lines)


def cell(rows: Sequence[dict[str, object]]) -> str:
    """Survived of tried."""
    return f"{sum(not row['bad'] for row in rows)}/{len(rows)}" if rows else "-"


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for."""
    layouts = options.layouts.split(",") if options.layouts else ["single"] if options.quick else weighted_layouts()
    unknown = [name for name in layouts if name not in LAYOUTS]
    if unknown:
        raise SystemExit(f"no layout is called {', '.join(unknown)}; write some of: {', '.join(LAYOUTS)}")
    named = [k for k in dict.fromkeys(f.kind for f in FAULTS if allowed(f, layouts)) if _asked(k, options.only)]
    kinds = [kind for kind in named for _ in range(SHARES.get(kind, 1))]
    if options.each:
        return [
            case
            for case in every_variant(options.seed, layouts)
            if _asked(f"{case.kind}: {case.variant}", options.only)
        ]
    numbers = [options.case] if options.case is not None else range(options.count)
    known = [case for case in known_faults(options.seed) if case.number == options.case or options.known]
    return known + [draw(number, options.seed, layouts, kinds) for number in numbers if number < KNOWN_FROM]


def _asked(name: str, only: str) -> bool:
    return any(part in name for part in only.split(","))


def weighted_layouts() -> list[str]:
    """All layouts; one process is drawn as often as five of the others, for it is fast."""
    return ["single"] * 5 + [name for name in LAYOUTS if name != "single"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, help="cases (340, or 16 with --quick)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one only")
    parser.add_argument("--each", action="store_true", help="every variant once, on the first layout that will do")
    parser.add_argument("--known", action="store_true", help="before the others, the faults that ended badly once")
    parser.add_argument(
        "--only", default="", help="kinds (with --each: variants) whose name contains one of these: TEXT,TEXT"
    )
    parser.add_argument("--layouts", help=f"some of: {', '.join(LAYOUTS)}")
    parser.add_argument("--quick", action="store_true", help="a few cases on one process")
    parser.add_argument("--workers", type=int, default=2, help="cases at a time")
    parser.add_argument("--results", type=Path, help="file of results, to go on with")
    parser.add_argument("--keep", action="store_true", help="keep the folders of the cases")
    options = parser.parse_args()
    if options.count is None:
        options.count = 16 if options.quick else 340
    cases = chosen_cases(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # folders are removed then too
    warm_up(deepspeed=any(LAYOUTS[case.layout].strategy == "zero" for case in cases))
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        results = options.results or root / "results.jsonl"
        campaign = Campaign(root, results, keep=options.keep)
        campaign.run(cases, options.workers)
        wanted = {(case.seed, case.number, case.kind) for case in cases}
        rows = [row for key, row in campaign.known().items() if key in wanted]
    finally:
        if options.keep:
            print(f"kept: {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)
    report(rows, options)
    sys.exit(any(row["bad"] for row in rows))


def report(rows: list[dict[str, object]], options: argparse.Namespace) -> None:
    """Prints the table, and keeps that of a whole campaign."""
    whole = options.case is None and options.count >= 300 and not (options.only or options.layouts or options.each)
    note = f"Commit {commit()}. Survived of tried; seed {options.seed}. A case's run of 12 steps saves every 2."
    command = f"python benchmarks/faults.py --count {options.count} --seed {options.seed}"
    publish(TITLE, command, summary(rows) + "\n\n" + note, keep=whole)


if __name__ == "__main__":
    main()
