"""A loop of Accelerate's with merges: the losses are those of a loop by hand; `load_state` goes on to the last bit."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from tests.distributed.pool import RankPool
from tests.integration.accelerate_cases import STEPS, Run, saved_and_loaded
from tests.unit.merge.small import Small, config, loss_of


def by_hand() -> list[float]:
    run = Run(None)
    run.steps(0, STEPS)
    return run.losses


def test_an_accumulated_loop_is_the_loop_by_hand_and_goes_on_from_what_it_saved(
    ranks: RankPool, tmp_path: Path
) -> None:
    """`prepare` and `finish` stand inside of `accumulate`, where each pass calls them. No warning is due."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="LoQT")
        found = saved_and_loaded(str(tmp_path / "one"))
    assert found["found"] == "one process" and found["steps"] == [0, 5, 10, 15]
    assert found["again"] and found["trained"]
    losses = by_hand()
    assert found["losses"] == losses and losses[-1] < losses[0] - 0.5
    two = ranks.run(2, "tests.integration.accelerate_cases:saved_and_loaded", folder=str(tmp_path / "two"))
    for result in two:
        assert result["found"] == "DistributedDataParallel, 2 rank(s)" and result["again"] and result["trained"]
    means = [(a + b) / 2 for a, b in zip(*(result["losses"] for result in two), strict=True)]
    assert means == pytest.approx(losses, abs=2e-3)  # a code of nf4 may fall to the other side


@pytest.mark.parametrize("by_muon", [True, pytest.param(False, marks=pytest.mark.long)])
def test_fsdp2_of_accelerates_goes_on_from_what_it_saved(ranks: RankPool, by_muon: bool, tmp_path: Path) -> None:
    """Its parameters take the place of those of which the optimizer was made; torch's checkpoints name the moments."""
    given = {"folder": str(tmp_path), "sharded": True, "by_muon": by_muon}
    for result in ranks.run(2, "tests.integration.accelerate_cases:saved_and_loaded", **given):
        assert result["found"] == "fully_shard over 2 rank(s)" and result["again"]
        assert sum(result["losses"][-4:]) < sum(result["losses"][:4]) - 2.0


def test_a_loop_that_ends_a_step_with_each_pass_is_told() -> None:
    """Where nothing says that gradients are accumulated, `finish` after each pass counts passes for steps."""
    from loqt_scale import attach, convert_to_loqt

    model, settings = Small(), config("sketch")
    before = model.state_dict()
    convert_to_loqt(model, settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    merges = attach(model, optimizer, settings, initial_weights=before)
    with pytest.warns(UserWarning, match=r"the optimizer has made no step in 4 of \d+: is it called after each pass"):
        for index in range(12):
            merges.prepare()
            loss_of(model, index).backward()
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()
            merges.finish()
