"""A streamed data set on ranks: the same losses on any number of them, and each reads and tokenizes its own part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import RankPool
from tests.distributed.runs import TRAIN, seldom

FILES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    words = ["low", "rank", "base", "factor", "merge", "sketch", "probe", "moment"]
    for number in range(FILES):
        rows = [" ".join(words[(number + row * k) % 8] for k in range(5, 60)) for row in range(300)]
        text = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (folder / f"train-{number:02d}.jsonl").write_text(text)
    (folder / "validation.jsonl").write_text("".join(json.dumps({"text": word * 9}) + "\n" for word in words))
    return folder


def common(world_size: int, run_dir: Path) -> dict[str, Any]:
    """Settings of a run on so many ranks."""
    return {
        "train.run_dir": str(run_dir),
        "train.global_batch_size": FILES,
        "train.steps": 8,
        "loqt.merge.gap": 5,
        "parallel.strategy": "ddp" if world_size > 1 else "single",
    }


@pytest.mark.parametrize(
    ("numbers", "resumes"),
    [*seldom(((2,), [(1, "2", 3)]), ((3, 4), [(1, "1", 3), (4, "3", 6), (2, "4", 3)]))],
)
def test_losses_are_those_of_one_rank_and_go_on_at_another_number(
    ranks: RankPool, folder: Path, tmp_path: Path, numbers: tuple[int, ...], resumes: list[tuple[int, str, int]]
) -> None:
    def run(world_size: int, name: str, **more: Any) -> dict[int, float]:
        settings = {
            "data.dataset": str(folder),
            "data.seq_len": 32,
            **common(world_size, tmp_path / name),
            "checkpoint.every": 3,
            "checkpoint.keep_last": 9,
        }
        rows = ranks.run(world_size, TRAIN, **{**settings, **more})[0]
        assert all(row["perf/data_wait_seconds"] >= 0 for row in rows if "train/loss" in row)
        return {int(row["step"]): row["train/loss"] for row in rows if "train/loss" in row}

    one = run(1, "1")
    for world_size in numbers:
        assert run(world_size, str(world_size)) == pytest.approx(one, abs=2e-4)
    for world_size, saved_by, step in resumes:
        checkpoint = tmp_path / saved_by / "checkpoints" / f"step-{step:08d}"
        rest = run(world_size, f"{saved_by}-on-{world_size}", **{"checkpoint.resume": str(checkpoint)})
        expected = {at: loss for at, loss in one.items() if at > step}
        assert rest == (expected if saved_by == "1" else pytest.approx(expected, abs=2e-4))


def test_sources_by_weight_give_the_same_losses_on_any_number_of_ranks(
    ranks: RankPool, folder: Path, text_file: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """Files and a streamed data set, whose weights change; a run goes on on another number of ranks."""

    def run(world_size: int, name: str, later: int = 100, **more: Any) -> list[dict[str, float]]:
        steps = [{"from_step": step, "weight": weight} for step, weight in ((0, 1), (4, 3), (later, 9))]
        settings = {
            "data.sources": [
                {"name": "topics", "files": [str(text_file)], "weight": 2.5},
                {"name": "words", "dataset": str(folder), "weight": steps},
                {"name": "few", "files": [str(folder / "validation.jsonl")], "weight": 0.4},
            ],
            "data.cache_dir": str(cache_dir),
            "data.streams": 6,
            **common(world_size, tmp_path / name),
            "checkpoint.every": 6,
        }
        return ranks.run(world_size, TRAIN, **{**settings, **more})[0]

    def numbers(rows: list[dict[str, float]], after: int = 0) -> dict[str, float]:
        """What must be equal, by step and name."""
        kept = ("train/loss", "train/tokens", "data/", "eval/")
        return {
            f"{row['step']} {key}": value
            for row in rows
            for key, value in row.items()
            if key.startswith(kept) and row["step"] > after and not key.endswith(("words/epochs", "perplexity"))
        }

    one = run(1, "1")
    assert numbers(run(2, "2")) == pytest.approx(numbers(one), abs=2e-4)
    checkpoint = str(tmp_path / "2" / "checkpoints" / "step-00000006")
    rest = run(1, "on-1", 50, **{"checkpoint.resume": checkpoint})  # weights of steps to come may change
    assert numbers(rest, 6) == pytest.approx(numbers(one, 6), abs=2e-4)
    names = ("topics", "words", "few")
    for row in one:
        if "train/loss" in row:
            assert sum(row[f"data/{name}/tokens"] for name in names) == row["train/tokens"]
            assert sum(row[f"data/{name}/share"] for name in names) == pytest.approx(1)
        if "eval/loss" in row:
            assert min(row[f"eval/{name}/loss"] for name in names) < row["eval/loss"]
            assert max(row[f"eval/{name}/loss"] for name in names) > row["eval/loss"]
    last = one[-2]
    assert last["data/words/share"] == pytest.approx((4 / 3.9 + 4 * 3 / 5.9) / 8, abs=0.04)
    assert last["data/few/epochs"] >= 1


def test_a_rank_reads_and_tokenizes_its_part_alone(ranks: RankPool, folder: Path) -> None:
    arguments = {"folder": str(folder), "steps": 3, "batch": FILES}
    ((whole_bytes, whole_tokens, whole),) = ranks.run(1, "tests.distributed.stream_tasks:read_share", **arguments)
    for world_size in (2, 3, 4):
        found = ranks.run(world_size, "tests.distributed.stream_tasks:read_share", **arguments)
        for read, tokens, _ in found:
            assert read < 1.2 * whole_bytes / world_size, (read, whole_bytes)
            assert tokens < 1.2 * whole_tokens / world_size, (tokens, whole_tokens)
        steps = [row for step in range(3) for _, _, sums in found for row in _of_step(sums, step)]
        assert steps == whole


def _of_step(sums: list[int], step: int) -> list[int]:
    share = len(sums) // 3
    return sums[step * share : (step + 1) * share]
