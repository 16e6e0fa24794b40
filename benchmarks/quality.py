"""How well does each method learn? Held-out perplexity beside the bytes of weights, gradients and optimizer states.

Full-rank AdamW and Muon, GaLore, APOLLO and LoQT in its variants train the same model on the same text, each at rates
that a sweep of its own has found: for the linears and, apart, for embeddings, norms and head. All of them run in the
product's own trainer: same initial weights, data order, clipping, warm-up and cosine, same held-out text.

    python benchmarks/quality.py --jobs 2                          # sweep, finalists and ablations on the CPU: hours
    python benchmarks/quality.py --minutes 30 --study sweep        # as much as there is time for; go on later
    python benchmarks/quality.py --files docs.txt --scale tiny --dtype bfloat16 --device cuda --jobs 12 --minutes 5
    python benchmarks/quality.py --run "loqt lr=5e-3 rest=5e-3 loqt.rank=64" --run "adamw lr=1e-3"
    python benchmarks/quality.py --table --figure                  # of what is in the results file

A finished run is a line of the results file and is not done again, whatever else is asked for later.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Container
from dataclasses import replace
from functools import partial
from pathlib import Path

from common import ROOT, commit
from quality_report import draw, publish_tables
from quality_results import Family, Group, Record, Results
from quality_runs import METHODS, SCALES, Place, Run, Scale, checked, parse_run, run_of
from quality_studies import STUDIES
from quality_workers import Workers, say

from loqt_scale.errors import ConfigError, UserError

RESULTS = ROOT / "benchmarks" / "quality.jsonl"
FIGURE = ROOT / "docs" / "quality.svg"


def main() -> int:
    """The command line; 1 if a run failed, 2 if something asked for cannot be."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # workers must not outlive us
    results = Results(Path(options.results))
    try:
        if options.table or options.figure:
            groups, failed = results.tables(), False
            if not groups:
                raise UserError(f"{results.path} holds no results; leave out --table and --figure to make some")
        else:
            groups, failed = do_runs(options, scale_of(options), results)
        publish_tables(groups, keep=Path(options.results).resolve() == RESULTS)
        if options.figure:
            draw(groups, Path(options.figure))
    except UserError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say(f"interrupted; what is finished is in {results.path}, the same command goes on from there")
        return 130
    return int(failed)


def parse() -> argparse.Namespace:
    """The command line's words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="micro", help="shape, tokens and rank")
    for name, kind in (("preset", str), ("steps", int), ("batch", int), ("seq-len", int), ("rank", int)):
        parser.add_argument(f"--{name}", type=kind, help="instead of the scale's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype (default: float32)")
    parser.add_argument("--files", nargs="+", default=[], metavar="FILE", help="text; default: the embedded corpus")
    parser.add_argument("--study", nargs="+", choices=STUDIES, default=[], help="default: all, if there is no --run")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="leave the others out of the studies")
    parser.add_argument("--run", action="append", default=[], help=f"METHOD lr=RATE ...; methods: {', '.join(METHODS)}")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--compile", action="store_true", help="the blocks of every model: faster")
    parser.add_argument("--jobs", type=int, default=1, help="runs beside one another, a process each")
    parser.add_argument("--threads", type=int, default=1, help="of a process")
    parser.add_argument("--minutes", type=float, default=1e6, help="what is not done by then is left for another time")
    parser.add_argument("--results", default=str(RESULTS), help="one JSON line a run")
    parser.add_argument("--cache-dir", help="of tokenized text")
    parser.add_argument("--again", action="store_true", help="do what --run names even if it is known")
    parser.add_argument("--list", action="store_true", help="only say what would be done next")
    parser.add_argument("--table", action="store_true", help="only print the tables of the results file")
    parser.add_argument("--figure", nargs="?", const=str(FIGURE), metavar="SVG", help="only draw what the tables say")
    options = parser.parse_args()
    if options.jobs < 1 or options.threads < 1:
        parser.error("--jobs and --threads are numbers of processes and threads; write 1 or more")
    options.study = options.study or ([] if options.run else list(STUDIES))
    options.deadline = time.monotonic() + 60 * options.minutes
    return options


def scale_of(options: argparse.Namespace) -> Scale:
    """The named scale, with what was asked for otherwise."""
    names = ("preset", "steps", "batch", "seq_len", "rank", "dtype")
    asked = {name: value for name in names if (value := getattr(options, name)) is not None}
    return replace(SCALES[options.scale], **asked)


def do_runs(options: argparse.Namespace, scale: Scale, results: Results) -> tuple[list[Group], bool]:
    """Does what is asked for and not known yet: (what there is at this scale now, whether a run failed).

    Raises:
        UserError: A run or the text cannot be.
    """
    asked = [parse_run(text, scale) for text in options.run]
    place = place_of(options)
    jobs = 0 if options.list else options.jobs
    with Workers(jobs, place, options.deadline, lambda record: keep(results, record)) as workers:
        text = text_of(place, scale)  # and writes the tokens that the workers, which are starting, will read
        queue = Queue(scale, text, results, options.methods or METHODS)
        again = set(asked) if options.again else set()
        asks = [partial(queue.new, asked, again), *(partial(queue.study, name) for name in options.study)]
        for ask in asks:
            if options.list:
                say("\n".join(run.words for run in ask()))
            workers.do(ask)
        return [(scale, text, results.of(scale, text))], bool(workers.failed)


def place_of(options: argparse.Namespace) -> Place:
    """Where runs are done."""
    return Place(
        files=tuple(str(Path(path).resolve()) for path in options.files),
        device=options.device,
        threads=options.threads,
        jobs=options.jobs,
        compile=options.compile,
        cache_dir=options.cache_dir,
        commit=commit(),
    )


def text_of(place: Place, scale: Scale) -> str:
    """The text's key; its tokens are in the cache then."""
    from quality_training import open_corpus, text_key  # takes seconds

    return text_key(open_corpus(place.config(Run(method="adamw", scale=scale, lr=1e-3, rest=1e-3))))


class Queue:
    """What is not known yet.

    Args:
        scale: Of the runs.
        text: Its key.
        results: What is known.
        methods: That studies are about.
    """

    def __init__(self, scale: Scale, text: str, results: Results, methods: Container[str] = METHODS) -> None:
        self.scale, self.text, self.results, self.methods = scale, text, results, methods
        self.possible: dict[Family, bool] = {}

    def study(self, name: str) -> list[Run]:
        """What a study wants next."""
        wanted = STUDIES[name](self.scale, self.results.of(self.scale, self.text))
        return self.new([run for run in wanted if run.method in self.methods])

    def new(self, runs: list[Run], again: set[Run] | None = None) -> list[Run]:
        """Those that are not known and can be done here; `again`: known or not, until they have been done now."""
        wanted = again or set()
        return [run for run in runs if (run in wanted or not self.known(run)) and self.can_be_done(run)]

    def known(self, run: Run) -> bool:
        """Whether the file has it."""
        return run.key(self.text) in self.results

    def can_be_done(self, run: Run) -> bool:
        """Whether the product knows its settings and its package is there; if not, that is said once a family."""
        if run.family not in self.possible:
            try:
                checked(run)
                self.possible[run.family] = True
            except ConfigError as error:
                self.possible[run.family] = False
                say(f"left out: {run.label}: {error}")
        return self.possible[run.family]


def keep(results: Results, record: Record) -> None:
    """Keeps a result and says it."""
    results.add(record)
    nats = "diverged" if record["nats"] is None else f"{record['nats']:.4f} nats"
    say(f"{run_of(record).words}: {nats}, {record['seconds']:.0f} s, {record['tokens_per_second']} tokens/s")


if __name__ == "__main__":
    sys.exit(main())
