"""benchmarks/quality.py without training: what it does next, what it keeps, what it compares."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from quality_report import draw, text_of
from quality_results import Record, Results, Table
from quality_runs import Run, Scale, parse_run, run_of, variant_of
from quality_studies import FURTHEST, REST, STUDIES, sweep

from loqt_scale.errors import ConfigError, UserError

SCALE = Scale(preset="llama_nano", steps=8, batch=2, rank=16)


def record(run: Run, nats: float | None, text: str = "t") -> Record:
    """A line as a run would leave it."""
    held = {"weight_bytes": 400, "gradient_bytes": 400, "state_bytes": 800, "tokens_per_second": 1000}
    scores = {"nats": nats, "perplexity": nats and math.exp(nats), "bits_per_byte": nats and nats / math.log(2)}
    where = {"device": "a CPU", "jobs": 1, "commit": "abc", "date": "2026-01-01", "text": text, "text_name": "a.txt"}
    return {**run.facts(), **held, **scores, **where}


def finish(study: str, known: list[tuple[Run, Record]], loss: dict[str, float], most: int = 400) -> list[Run]:
    """Does what a study asks for, with losses that are parabolas of both rates, until it has nothing new."""
    done = {run for run, _ in known}
    for _ in range(most):
        new = [run for run in STUDIES[study](SCALE, Table(known)) if run not in done]
        if not new:
            return [run for run, _ in known]
        run = new[0]
        done.add(run)
        nats = 1.0 + 0.1 * math.log2(run.lr / loss[run.method]) ** 2 + 0.1 * math.log2(run.rest / loss["rest"]) ** 2
        known.append((run, record(run, None if run.lr > 8 * loss[run.method] else nats + 0.001 * run.seed)))
    raise AssertionError(f"{study} does not end")


@settings(max_examples=8)
@given(shifts=st.lists(st.integers(-2, 2), min_size=6, max_size=6))
def test_a_sweep_finds_both_best_rates_wherever_they_are(shifts: list[int]) -> None:
    firsts = {"adamw": 1e-3, "loqt": 5e-3, "muon": 2e-3, "galore": 1e-2, "apollo": 1e-2, "rest": REST}
    loss = {name: rate * 2.0**shift for (name, rate), shift in zip(firsts.items(), shifts, strict=True)}
    known: list[tuple[Run, Record]] = []
    runs = finish("sweep", known, loss)
    assert len(set(runs)) == len(runs)
    for best in Table(known).every_best():
        assert best.rates >= 3 and not best.at_edge and not best.rest_at_edge
        assert best.run.lr == pytest.approx(loss[best.run.method])
        assert best.run.rest == pytest.approx(loss["rest"])
    finish("finalists", known, loss)
    for best in Table(known).every_best():
        assert sorted(Table(known).best(best.run.family).by_seed) == [0, 1, 2]  # type: ignore[union-attr]


def test_a_sweep_goes_on_where_another_rate_of_the_rest_wants_another_of_the_linears() -> None:
    """The best pair is reached in steps of which each is better: (2, 1), (4, 1), (4, 2) times the first."""
    known: list[tuple[Run, Record]] = []
    while new := [run for run in sweep(SCALE, Table(known)) if run not in {done for done, _ in known}]:
        for run in new:
            x, y = math.log2(run.lr / 1e-3) - 2, math.log2(run.rest / REST) - 1
            known.append((run, record(run, 1.0 + x * x + y * y - 0.8 * x * y)))
    best = Table(known).best(("adamw", ()))
    assert best is not None and (best.run.lr, best.run.rest) == (pytest.approx(4e-3), pytest.approx(2 * REST))
    assert not best.at_edge and not best.rest_at_edge


def test_a_method_that_always_diverges_ends_its_sweep_and_is_named() -> None:
    known: list[tuple[Run, Record]] = []
    while new := [run for run in sweep(SCALE, Table(known)) if run not in {done for done, _ in known}]:
        known += [(run, record(run, None if run.method == "apollo" else 1.0 + abs(math.log(run.lr)))) for run in new]
    tried = [run.lr for run, _ in known if run.method == "apollo"]
    assert min(tried) == pytest.approx(1e-2 / FURTHEST) and Table(known).best(("apollo", ())) is None
    assert "Diverged at every rate: APOLLO, rank 16." in text_of(SCALE, Table(known))


def test_ablations_start_from_the_best_loqt() -> None:
    known: list[tuple[Run, Record]] = []
    wide = variant_of({"loqt.rank": 32}, SCALE)
    for lr, nats in ((1e-3, 1.5), (2e-3, 1.4), (4e-3, 1.6)):
        known += [(run := Run(method="loqt", scale=SCALE, lr=lr, rest=REST, variant=wide), record(run, nats))]
    first, *others = STUDIES["ablations"](SCALE, Table(known))
    assert (first.lr, first.variant) == (2e-3, wide)
    assert all(run.lr == 2e-3 and dict(run.variant)["loqt.rank"] == "32" and run.variant != wide for run in others)


def test_results_survive_a_writer_that_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, runs = tmp_path / "results.jsonl", [parse_run(f"adamw lr={lr}", SCALE) for lr in ("1e-3", "2e-3")]
    Results(path).add(record(runs[0], 1.5))
    path.write_bytes(path.read_bytes() + json.dumps(record(runs[1], 1.4)).encode()[:-9])
    results = Results(path)
    assert "line 2: not a whole result" in capsys.readouterr().err
    assert runs[0].key("t") in results and runs[1].key("t") not in results
    results.add(record(runs[1], 1.3))
    results.add(record(runs[0], 1.2))  # again: the last one counts
    assert [(run_of(line), line["nats"]) for line in Results(path)] == [(runs[0], 1.2), (runs[1], 1.3)]
    assert runs[0].key("another text") not in results


def test_perplexities_are_compared_seed_by_seed() -> None:
    pairs = [(parse_run(f"adamw lr=1e-3 seed={seed}", SCALE), 1.0 + seed) for seed in (0, 1)]
    pairs += [(parse_run(f"loqt lr=1e-3 seed={seed}", SCALE), 0.9 + seed) for seed in (0, 1, 2)]
    known = Table([(run, record(run, nats)) for run, nats in pairs])
    loqt, adamw = known.best(("loqt", ())), known.best(("adamw", ()))
    assert loqt is not None and adamw is not None
    assert loqt.over(adamw) == pytest.approx([math.exp(-0.1)] * 2)


def test_the_figure_names_every_method_and_is_the_same_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = {"adamw lr=1e-3": 1.0, "muon lr=1e-3": 0.9, "loqt lr=1e-3 optim.states=int8 loqt.rank=32": 0.95}
    runs = [(parse_run(f"{text} seed={seed}", SCALE), nats) for text, nats in words.items() for seed in (0, 1)]
    known = Table([(run, record(run, nats + 0.01 * run.seed)) for run, nats in runs])
    for name in ("a.svg", "b.svg"):
        draw([(SCALE, "t", known)], tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text(encoding="utf-8")
    for label in ("full-rank AdamW: 1.000, 1.00", "full-rank Muon: 0.905, 1.00", "LoQT, rank 32, 8-bit states: 0.951"):
        assert label in drawn
    assert drawn == (tmp_path / "b.svg").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="write --run 'adamw"):
        draw([(SCALE, "t", Table([]))], tmp_path / "c.svg")


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("sgd lr=1", "write one of adamw, muon"),
        ("", "write one of adamw, muon"),
        ("loqt rest=1e-3", "write METHOD lr=RATE"),
        ("loqt lr=fast", "write numbers"),
        ("loqt lr=1e-3 loqt.rnk=4", "loqt.rank"),
        ("loqt lr=1e-3 optim.states=int8 loqt.rank=20", "write a rank from 32 to 256"),
        ("loqt lr=1e-3 optim.lr=5e-2", "sets optim.lr"),
        ("adamw lr=1e-3 train.device=cpu", "sets train.device"),
        ("loqt lr=1e-3 data.max_eval_sequences=3", "sets data.max_eval_sequences"),
        ("muon lr=1e-3 optim.momentum=0.9", "does not read optim.momentum.*write muon.momentum, "),
        ("loqt lr=1e-3 optim.momentum=0.9", "does not read optim.momentum.*with optim.name=muon"),
        ("adamw lr=1e-3 optim.name=muon", "does not read optim.name"),
        ("full lr=1e-3 loqt.rank=32", "does not read loqt.rank"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(text: str, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        parse_run(text, SCALE)


def test_what_a_method_does_not_read_is_known() -> None:
    muon = ("optim.name", "muon"), ("optim.momentum", "0.9")
    assert all(
        Run(method=name, scale=SCALE, lr=1.0, rest=1.0, variant=muon).reads(muon[1][0]) for name in ("loqt", "full")
    )
    galore = Run(method="galore", scale=SCALE, lr=1.0, rest=1.0)
    assert galore.reads("loqt.rank") and galore.reads("galore.scale") and galore.reads("optim.clip_norm")
    assert not any(map(galore.reads, ("galore.scal", "loqt.merge.gap", "optim.states")))


def test_one_run_has_one_form() -> None:
    text = "loqt optim.states=int8 loqt.rank=32 lr=5e-3"
    run = parse_run(text, SCALE)
    assert run == parse_run("loqt loqt.rank=32 lr=0.005 rest=5e-3 optim.states=int8 seed=0", SCALE)
    assert run == run_of(json.loads(json.dumps(run.facts()))) and run == parse_run(run.words, SCALE)
    assert parse_run("loqt lr=5e-3 loqt.rank=16", SCALE) == parse_run("loqt lr=5e-3", SCALE)
    assert run.settings["loqt.rank"] == "32" and run.settings["optim.states"] == "int8"
    assert parse_run("muon lr=1 muon.momentum=0.9", SCALE).options == {"momentum": 0.9}
