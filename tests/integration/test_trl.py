"""LoQTCallback in TRL's trainers, where TRL is installed: its own losses and reference models, on one rank and two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from loqt_scale.layers import loqt_layers
from tests.distributed.pool import RankPool
from tests.integration.trainer_cases import callback_of, losses

pytest.importorskip("trl")
from tests.integration.trl_cases import make_trainer


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")  # no telemetry


def test_sft(tmp_path: Path) -> None:
    trainer = make_trainer("sft", tmp_path)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.4
    assert [report.step for report in callback_of(trainer).reports] == [0, 5]
    trainer.save_model(str(tmp_path / "end"))
    saved, row = AutoModelForCausalLM.from_pretrained(tmp_path / "end"), torch.arange(12)[None] + 3
    with torch.no_grad():
        torch.testing.assert_close(saved(row).logits, trainer.model.eval()(row).logits)


def test_dpo_compares_with_the_model_from_before(tmp_path: Path) -> None:
    trainer = make_trainer("dpo", tmp_path)
    assert not list(loqt_layers(trainer.ref_model))
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.05
    assert [report.step for report in callback_of(trainer).reports] == [0, 5]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_two_ranks_take_the_steps_of_one(ranks: RankPool, kind: str, tmp_path: Path) -> None:
    task = "tests.integration.trl_cases:trained_losses"
    one = ranks.run(1, task, kind=kind, folder=str(tmp_path), spread="plain")[0]
    assert one["merges"] == [0, 5] and one["losses"][-1] < one["losses"][0] - 0.05
    for spread in ("ddp", "fsdp", "zero2"):
        for result in ranks.run(2, task, kind=kind, folder=str(tmp_path), spread=spread):
            assert result["losses"] == pytest.approx(one["losses"], abs=2e-5), spread
            assert result["merges"] == one["merges"]
