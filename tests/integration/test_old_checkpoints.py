"""Checkpoints of an earlier version go on to the losses that it had gone on to itself.

`tests/checkpoints/format-1.tar.xz` was written on 2026-11-27 by commit 777d9a0, before the modules moved: a text, and
of two runs on it the checkpoint of step 3 with the losses of steps 4 to 6 (a merge follows steps 4 and 6).
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from loqt_scale.cli import run_command

PACKED = Path(__file__).parents[1] / "checkpoints" / "format-1.tar.xz"


@pytest.mark.parametrize("run", ["muon", "fsdp"])  # 8-bit moments of Muon; AdamW's, in shards of two ranks
def test_an_old_checkpoint_goes_on(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(PACKED) as packed:
        packed.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path / "format-1")
    old = Path(run, "step-00000003")
    words = ["--config", str(old / "config.yaml"), "--checkpoint.resume", str(old), "--train.run_dir", "new"]
    words += ["--parallel.strategy", "single", "--train.log_every", "1"]
    assert run_command("train", words, prog="train.py") == 0
    records = map(json.loads, Path("new", "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    losses = {str(record["step"]): record["train/loss"] for record in records if "train/loss" in record}
    expected = json.loads(Path(run, "losses.json").read_text(encoding="utf-8"))["losses"]
    assert losses == pytest.approx(expected, rel=1e-5)  # another processor, and one rank for two, sum in another order
