"""What a run is told of its merges, through the command that a user types."""

from __future__ import annotations

from pathlib import Path

import pytest

from loqt_scale.cli import main

SMALL = {
    "model.preset": "llama_nano",
    "data.seq_len": "128",
    "data.max_eval_sequences": "4",
    "loqt.rank": "8",
    "loqt.merge.schedule": "constant",
    "optim.lr": "5e-3",
    "optim.warmup_steps": "4",
    "train.global_batch_size": "64",
    "train.micro_batch_size": "64",
    "train.progress": "off",
}


@pytest.mark.parametrize(("gap", "steps", "merges", "told"), [(1, 9, 9, True), (5, 16, 4, False)])
def test_merges_that_find_the_old_subspace_are_told_with_what_to_change(
    text_file: Path, cache_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    gap: int, steps: int, merges: int, told: bool,
) -> None:  # fmt: skip
    """A real run at a sound rate: after every step P is the old one where the gradient is, not in all columns."""
    where = {"data.files": f"[{text_file}]", "data.cache_dir": str(cache_dir), "train.run_dir": str(tmp_path / "run")}
    settings = {**SMALL, **where, "loqt.merge.gap": str(gap), "train.steps": str(steps)}
    assert main(["train", *(f"--{key}={value}" for key, value in settings.items())]) == 0
    said = capfd.readouterr().out
    assert said.count(" by energy)") == merges - 1
    warnings = [line for line in said.splitlines() if "WARNING" in line]
    assert len(warnings) == (1 if told else 0) or (told and all("by now" in line for line in warnings[1:]))
    if told:
        assert "found the subspace that was there" in warnings[0] and "loqt.merge.gap: 2 instead of 1" in warnings[0]
        assert "raise optim.lr 0.005" in warnings[0] and "loqt.rank than 8" in warnings[0]
