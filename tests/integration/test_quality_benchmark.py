"""benchmarks/quality.py trains: bytes are those of the tensors, workers may die, what is finished stays finished."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from quality_results import Results
from quality_runs import Place, Run, Scale, parse_run
from quality_training import make_trainer, storages, train
from quality_workers import Workers

SCALE = Scale(preset="llama_nano", steps=4, batch=16, rank=16, seq_len=32)
LINEARS = 2 * (4 * 64 * 64 + 3 * 64 * 172)  # values
REST = 2 * 320 * 64 + 5 * 64
TENSORS = 2 * (7 + 2) + 3
TIMES = ("seconds", "tokens_per_second", "date")


@pytest.fixture(scope="module")
def place(text_file: Path, cache_dir: Path) -> Place:
    return Place(files=(str(text_file),), device="cpu", cache_dir=str(cache_dir))


def do(text: str, place: Place) -> dict[str, Any]:
    """A run in this process."""
    return train(parse_run(text, SCALE), place, lambda done, seconds: None)


def test_the_bytes_of_full_rank_training_are_sixteen_a_parameter(place: Place) -> None:
    line = do("adamw lr=1e-3", place)
    assert line["parameters"] == LINEARS + REST
    assert line["weight_bytes"] == line["gradient_bytes"] == 4 * (LINEARS + REST)
    assert line["state_bytes"] == 8 * (LINEARS + REST) + 4 * TENSORS  # and a count of steps a tensor
    assert list(line["curve"]) == ["1", "2", "3", "4"] and line["nats"] == line["curve"]["4"] < math.log(320)
    assert line["bits_per_byte"] >= round(line["nats"] / math.log(2), 4)  # ends of documents cost and are no bytes
    assert str(Path(place.files[0]).parent) not in str(line)


def test_muon_has_one_moment_of_the_linears(place: Place) -> None:
    line = do("muon lr=1e-3", place)
    assert line["weight_bytes"] == line["gradient_bytes"] == 4 * (LINEARS + REST)
    assert line["state_bytes"] == 4 * LINEARS + 8 * REST + 4 * 7  # embedding, head, five norms


def test_loqt_has_packed_weights_and_factors(place: Place) -> None:
    line = do("loqt lr=1e-3", place)
    factors = 2 * 16 * (4 * 64 + 2 * 172 + 172)
    assert line["parameters"] == LINEARS + REST
    assert line["gradient_bytes"] == 4 * (factors + REST)
    assert line["state_bytes"] == 8 * (factors + REST) + 4 * TENSORS
    packed = line["weight_bytes"] - 4 * (factors + REST)
    assert 0.5 * LINEARS < packed < 1.0 * LINEARS  # half a byte a value of W and of P, and scales
    lean = do("loqt lr=1e-3 loqt.rank=32 optim.states=int8", place)
    assert lean["state_bytes"] < 0.6 * 8 * (2 * factors + REST)
    assert do("loqt lr=1e-3 loqt.init=loftq", place)["nats"] != line["nats"]  # the start that it asks for takes place
    per_layer = do("loqt lr=1e-3 optim.per_layer=true optim.clip_norm=0", place)
    assert 4 * 320 * 64 <= per_layer["gradient_bytes"] < line["gradient_bytes"] / 2


@pytest.mark.parametrize("method", ["galore", "apollo"])
def test_methods_of_other_hands_keep_small_states(method: str, place: Place) -> None:
    pytest.importorskip(f"{method}_torch")
    line = do(f"{method} lr=1e-2", place)
    small = 2 * 16 * (4 * 64 + 3 * 172)  # of a moment
    projections = 2 * 16 * 64 * 7
    assert line["state_bytes"] - 4 * 14 <= 8 * (small + REST) + 4 * projections <= line["state_bytes"] + 4 * 14


def test_all_methods_share_initial_weights_schedule_and_loop(place: Place, tmp_path: Path) -> None:
    from quality_baselines import use_optimizer

    seen = {}
    for method in ("adamw", "muon"):
        run = parse_run(f"{method} lr=1e-3 rest=2e-3", SCALE)
        trainer = make_trainer(place.config(run), str(tmp_path))
        use_optimizer(trainer, method, run.options)
        rates = []
        for step in range(4):
            rates.append([group["lr"] for group in trainer.optimizer.param_groups])
            trainer.step(step)
        seen[method] = (rates, trainer.evaluate(4))
    assert seen["adamw"][0] == seen["muon"][0] and seen["adamw"][1] != seen["muon"][1]


def test_a_run_that_diverges_is_a_result(place: Place) -> None:
    line = do("adamw lr=1e30 optim.max_skipped_steps=1", place)
    assert line["diverged"] and line["nats"] is None and line["perplexity"] is None


def test_storages_are_found_wherever_they_are_and_counted_once() -> None:
    weight = nn.Parameter(nn.Linear(4, 4).weight.detach().clone())

    class Holder:
        def __init__(self) -> None:
            self.inner = {"a": [weight, weight[1:]], "b": (self,)}

    assert list(storages([Holder(), weight]).values()) == [64]
    assert list(storages({"rows": weight[1:3]}).values()) == [32]


def test_workers_may_be_killed_and_the_rest_is_done_later(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    runs = [parse_run(f"{words}", SCALE) for words in ("adamw lr=1e-3", "loqt lr=5e-3")]

    def left(known: Results) -> list[Run]:
        return [run for run in runs if not any(line["method"] == run.method for line in known)]

    results = Results(path)
    with Workers(2, place, time.monotonic() + 120, results.add) as workers:
        workers.workers[0].process.kill()  # before its first run is done
        workers.do(lambda: left(results))
        assert workers.failed == {runs[0]} and len(list(results)) == 1
        path.write_bytes(path.read_bytes() + b'{"method": "ad')  # as a killed writer leaves it
        again = Results(path)
        workers.failed.clear()
        workers.keep = again.add
        workers.do(lambda: left(again))
    assert {line["method"] for line in Results(path)} == {"adamw", "loqt"}
    for line in Results(path):
        alone = do(f"{line['method']} lr={line['lr']}", place)
        assert {k: v for k, v in line.items() if k not in TIMES} == {k: v for k, v in alone.items() if k not in TIMES}
