"""`to_dense` and `save_merged` of models that several ranks hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import RankPool

STRATEGIES: list[dict[str, Any]] = [
    {"parallel.strategy": "fsdp"},
    {"parallel.strategy": "zero", "parallel.zero_stage": 3},
    {"parallel.strategy": "ddp"},
]


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(strategy, id=name, marks=[pytest.mark.long] if name == "ddp" else [])
        for strategy, name in zip(STRATEGIES, ("fsdp", "zero3", "ddp"), strict=True)
    ],
)
def test_a_sharded_model_goes_back_dense_on_every_rank_and_into_one_folder(
    ranks: RankPool, strategy: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**strategy, "train.run_dir": str(tmp_path / "run")}
    task = "tests.distributed.dense_tasks:made_dense"
    for result in ranks.run(2, task, folder=str(tmp_path / "merged"), **settings):
        assert result["dense"] < 1e-4 * result["largest"] and result["read"] < 1e-4 * result["largest"]
        assert result["kind"] == "LlamaForCausalLM" and result["layers"] == 0
        assert "config.json" in result["files"] and "model.safetensors" in result["files"]
        assert ("save_merged(model, folder) on every rank" in result["refused"]) == (strategy != STRATEGIES[2])
