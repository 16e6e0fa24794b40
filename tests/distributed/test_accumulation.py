"""The sum of a step's gradients over many passes, where what trains is bfloat16: against float64, on every strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import RankPool

PASSES = 32  # autograd's own bfloat16 sums are 0.49% to 0.61% wrong by then; the bound below is 0.39%
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
BFLOAT16 = {"model.dtype": "bfloat16", "model.trained_dtype": "bfloat16", "model.overrides": TINY, "data.seq_len": 8}


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        pytest.param(1, {"strategy": "single"}, id="single", marks=pytest.mark.long),
        pytest.param(1, {"offload": "all"}, id="offload", marks=pytest.mark.long),
        pytest.param(2, {"strategy": "ddp"}, id="ddp"),
        pytest.param(
            2, {"strategy": "fsdp", "kept_between_passes": "nothing"}, id="fsdp-nothing", marks=pytest.mark.long
        ),
        pytest.param(2, {"strategy": "fsdp"}, id="fsdp", marks=pytest.mark.long),  # FSDP2's own doing
    ],
)
def test_many_passes_are_rounded_once(
    ranks: RankPool, tmp_path: Path, text_file: Path, cache_dir: Path, world_size: int, parallel: dict[str, Any]
) -> None:
    settings = {f"parallel.{key}": value for key, value in parallel.items()} | BFLOAT16
    settings |= {"data.files": [str(text_file)], "data.cache_dir": str(cache_dir), "train.run_dir": str(tmp_path)}
    settings |= {"train.global_batch_size": PASSES * world_size, "train.micro_batch_size": 1}
    for errors in ranks.run(world_size, "tests.distributed.accumulation_tasks:summed_gradients", **settings):
        assert set(errors) == {"low_rank", "full_precision"}
        assert all(0.0 < error < 2**-8 for error in errors.values()), errors
