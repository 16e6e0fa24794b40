"""What a run is told of its merges, through the command that a user types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loqt_scale.cli import main
from tests.integration.test_run import rows_of

SMALL = {
    "model.preset": "llama_nano",
    "data.seq_len": 128,
    "data.max_eval_sequences": 4,
    "loqt.merge.schedule": "constant",
    "optim.warmup_steps": 4,
    "train.progress": "off",
}
BATCH, SMALL_BATCH = ({"train.global_batch_size": size, "train.micro_batch_size": size} for size in (32, 8))
FROZEN = {**BATCH, "optim.lr": 1e-4, "loqt.rank": 24, "loqt.merge.gap": 1, "train.steps": 9}
SOUND = {**SMALL_BATCH, "optim.lr": 5e-3, "loqt.rank": 16, "loqt.merge.gap": 50, "train.steps": 301}


@pytest.mark.parametrize(("run", "told"), [(FROZEN, True), pytest.param(SOUND, False, marks=pytest.mark.long)])
def test_merges_that_find_the_old_subspace_are_told_with_what_to_change(
    text_file: Path, cache_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], run: dict[str, Any], told: bool
) -> None:
    """A real run that merges after every step of a low rate: P is the old one where the gradient is, not elsewhere."""
    where = {"data.files": f"[{text_file}]", "data.cache_dir": str(cache_dir), "train.run_dir": str(tmp_path / "run")}
    assert main(["train", *(f"--{key}={value}" for key, value in {**SMALL, **where, **run}.items())]) == 0
    warnings = [line for line in capfd.readouterr().out.splitlines() if "WARNING" in line]
    overlaps = [row for row in rows_of(tmp_path / "run") if "merge/energy_overlap" in row]
    assert len(overlaps) == (run["train.steps"] - 1) // run["loqt.merge.gap"]
    assert bool(warnings) == told
    if told:
        assert "found the subspace that was there" in warnings[0] and "loqt.merge.gap: 2 instead of 1" in warnings[0]
        assert "raise optim.lr 0.0001" in warnings[0] and "loqt.rank than 24" in warnings[0]
        assert all(row["merge/subspace_overlap"] < 0.85 < row["merge/energy_overlap"] for row in overlaps[-3:])
