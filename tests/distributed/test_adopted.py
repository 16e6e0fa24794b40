"""Models that their owners spread over ranks: found, merged as one process merges, or refused with what to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import RankPool

TASKS = "tests.distributed.adopted_tasks"
FOUND = {
    "ddp": "DistributedDataParallel, 2 rank(s)",
    "fsdp": "fully_shard over 2 rank(s)",
    "hsdp": "fully_shard, 2 replica(s) of 2 shard(s) (HSDP)",
    "zero2": "DeepSpeed engine, ZeRO stage 2, 2 rank(s)",
    "zero3": "DeepSpeed engine, ZeRO stage 3, 2 rank(s)",
}
TOLERANCE = {"none": 1e-5, "nf4": 1e-3}  # a rounding that falls the other way moves a code of nf4 by a step


@pytest.fixture(scope="module")
def single(ranks: RankPool) -> dict[str, dict[str, Any]]:
    """One process, by scheme."""
    return {scheme: ranks.run(1, f"{TASKS}:train_own", how="single", scheme=scheme)[0] for scheme in ("none", "nf4")}


@pytest.mark.parametrize("scheme", ["none", pytest.param("nf4", marks=pytest.mark.long)])
@pytest.mark.parametrize("how", list(FOUND))
def test_a_loop_of_ones_own_trains_as_one_process(
    ranks: RankPool, single: dict[str, dict[str, Any]], how: str, scheme: str
) -> None:
    """Plainly, and with two passes a step whose number is told."""
    count = 4 if how == "hsdp" else 2
    two_passes = how in ("fsdp", "zero2") and scheme == "none"
    given: dict[str, Any] = {"micro": 2, "counted": True} if two_passes else {}
    results = ranks.run(count, f"{TASKS}:train_own", how=how, scheme=scheme, **given)
    expected = single[scheme]
    for result in results:
        assert result["found"] == FOUND[how]
        assert result["steps"] == expected["steps"] == [0, 5, 10, 15] and len(result["merges"]) == 3
        assert result["losses"] == pytest.approx(expected["losses"], abs=TOLERANCE[scheme], rel=0)
        for ours, theirs in zip(result["merges"], expected["merges"], strict=True):
            assert ours == pytest.approx(theirs, abs=20 * TOLERANCE[scheme], rel=0)


def test_finish_after_each_pass_waits_until_the_engine_has_updated(
    ranks: RankPool, single: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """As Lightning calls it: DeepSpeed accumulates by itself. Its own settings of stage 3 go on, too."""
    for how in ("zero2", "zero3"):
        given: dict[str, Any] = {"scheme": "none", "micro": 2, "each_pass": True, "saved_in": str(tmp_path / how)}
        for result in ranks.run(2, f"{TASKS}:train_own", how=how, **given):
            assert result["steps"] == [0, 5, 10, 15] and len(result["merges"]) == 3
            assert result["losses"] == pytest.approx(single["none"]["losses"], abs=TOLERANCE["none"], rel=0)
            assert result["again"] == result["losses"][7:]


RANKS = {"hsdp": 4}
MUON = [
    ("float32", ["ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3"]),
    ("int8", ["fsdp", "zero1", "zero3"]),
    pytest.param("int8", ["ddp", "hsdp", "zero2"], marks=pytest.mark.long),
]


@pytest.mark.parametrize(("states", "spreads"), MUON)
def test_muon_learns_from_attach_how_its_parameters_are_spread(
    ranks: RankPool, states: str, spreads: list[str], tmp_path: Path
) -> None:
    """Rows of B end where `fully_shard` or a flat tensor of DeepSpeed's ends. Saved and loaded, it goes on to the bit.

    Codes of 8 bits that fall to the other side move losses by what 8 bits move them.
    """
    given: dict[str, Any] = {"scheme": "none", "states": states}
    single = ranks.run(1, f"{TASKS}:train_own", how="single", **given)[0]
    assert ("torch.uint8" in single["kept in"]) == (states == "int8")
    for how in spreads:
        saved_in = "" if states == "float32" else str(tmp_path / how)
        for result in ranks.run(RANKS.get(how, 2), f"{TASKS}:train_own", how=how, saved_in=saved_in, **given):
            allowed = TOLERANCE["none"] if states == "float32" else 2e-3
            assert result["losses"] == pytest.approx(single["losses"], abs=allowed, rel=0), how
            assert states == "float32" or result["again"] == result["losses"][7:], how


def test_a_full_rank_model_under_muon_takes_the_steps_of_one_process(ranks: RankPool) -> None:
    """Told how it is spread by `place`; without that its first step says what to write."""
    single = ranks.run(1, f"{TASKS}:train_full", how="single")[0]
    assert single["found"] == "one process" and single["losses"][-1] < single["losses"][0] - 0.2
    for how in FOUND:
        for result in ranks.run(RANKS.get(how, 2), f"{TASKS}:train_full", how=how):
            assert result["losses"] == pytest.approx(single["losses"], abs=TOLERANCE["none"], rel=0), how
            assert result["found"] == FOUND[how]
    for how in ("fsdp", "zero1", "zero3"):
        for result in ranks.run(2, f"{TASKS}:train_full", how=how, placed=False):
            assert "loqt_scale.strategies.place(model" in result["found"] and not result["losses"], how


def test_quantized_experts_in_a_loop_of_ones_own_train_as_in_one_process(ranks: RankPool, tmp_path: Path) -> None:
    """Cut inside an expert. Each goes on from what it has saved to the bit, too."""
    given: dict[str, Any] = {"scheme": "nf4", "experts": True}
    single = ranks.run(1, f"{TASKS}:train_own", how="single", **given)[0]
    assert single["losses"][-1] < single["losses"][0] - 0.1
    for how in ("fsdp", "hsdp", "zero1", "zero2", "zero3"):
        for result in ranks.run(
            RANKS.get(how, 2), f"{TASKS}:train_own", how=how, saved_in=str(tmp_path / how), **given
        ):
            assert result["losses"] == pytest.approx(single["losses"], abs=TOLERANCE["nf4"], rel=0), how
            assert result["again"] == result["losses"][7:], how
            for ours, theirs in zip(result["merges"], single["merges"], strict=True):
                assert ours == pytest.approx(theirs, abs=20 * TOLERANCE["nf4"], rel=0), how


def test_replicas_share_out_layers_and_errors(ranks: RankPool) -> None:
    """HSDP, 2 x 2: each layer is merged in one replica; one that cannot ends the turn for all, and it is taken up."""
    results = ranks.run(4, "tests.distributed.replica_tasks:shared_over_replicas")
    a, b = results[0]["merged"], results[2]["merged"]
    assert results[1]["merged"] == a and results[3]["merged"] == b and len(a) == len(b) == 3 * 2
    assert [result["bits"] for result in results[:2]] == [result["bits"] for result in results[2:]], (
        "copies are the same"
    )
    all_layers = {f"blocks.{index}.{name}" for index in (0, 1) for name in ("up", "down")}
    assert not set(a) & set(b) and set(a) | set(b) == all_layers
    assert sum(result["rows"] for result in results) == 2 * (86 + 48), "each row is read once"
    for rank, result in enumerate(results):
        assert result["same"], rank
        first, second = result["merged"][2:4]
        assert result["merged with an error"][2:5] == [first, second, second], "the turn before is not merged again"
        expected = "MemoryError: no room" if rank >= 2 else f"RuntimeError: another replica could not merge {b[3]}: "
        assert result["told"].startswith(expected) and "no room" in result["told"]


def test_what_would_drift_apart_is_refused(ranks: RankPool) -> None:
    told = ranks.run(2, f"{TASKS}:refusals")[1]
    assert "2 ranks" in told["plain"] and "the DistributedDataParallel object" in told["plain"]
    assert told["compiled ddp"] == FOUND["ddp"]
    assert "is not sharded" in told["partly sharded"] and "fully_shard(model, mesh=mesh)" in told["partly sharded"]
    assert "2 meshes" in told["two meshes"] and "(1, 2)" in told["two meshes"]
    assert "attach(model, optimizer, config) comes before the first step" in told["muon before attach"]
    assert "before fully_shard" in told["optimizer before fully_shard"]


def test_an_engine_whose_settings_break_merges_is_refused(ranks: RankPool) -> None:
    for told in ranks.run(2, f"{TASKS}:refused_engine"):
        assert told.startswith(
            "the DeepSpeed engine's configuration: zero_optimization.round_robin_gradients is true, but a merge would"
        )
        assert told.endswith("; write false, or leave it out")


STAGES = [("own_deepspeed", ["--stage", str(stage)]) for stage in (1, 2, 3)]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("own_fsdp2", []), STAGES[2], *(pytest.param(*stage, marks=pytest.mark.long) for stage in STAGES[:2])],
)
def test_the_examples_for_several_ranks_run(ranks: RankPool, tmp_path: Path, name: str, arguments: list[str]) -> None:
    """Both methods, beside one process; the same command again finds what it has kept, on every rank."""
    given: dict[str, Any] = {"name": name, "out": str(tmp_path), "arguments": arguments}
    (first, other), (again, _) = (ranks.run(2, f"{TASKS}:run_example", **given) for _ in range(2))
    rows, rows_again = (
        [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith(("| loqt", "| full"))]
        for printed in (first, again)
    )
    results, beside = rows[:2], rows[2:]
    assert [len(row) for row in rows] == [5, 5, 5, 5] and "MB a rank" in first and "|" not in other
    assert float(results[0][4]) < 0.6 * float(results[1][4])  # bytes of the states
    assert all(float(row[2]) < 1e-5 for row in beside)
    assert first.count("learning rate") == 4 and "learning rate" not in again
    assert rows_again == rows
    assert len(list(tmp_path.glob("own_*.png"))) == 1
