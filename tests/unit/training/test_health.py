"""Skipped steps are counted; too many in a row end the run; the merge of a skipped step follows the next one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from loqt_scale.config import LoQTConfig, MergeConfig
from loqt_scale.layers import LoQTLinear
from loqt_scale.merge import MergeCoordinator
from loqt_scale.strategies import single_process
from loqt_scale.training.health import Health, NonFiniteLossError, spoil_gradient


def test_patience_is_for_steps_in_a_row() -> None:
    health = Health(patience=2)
    assert health.judge(1, 2.0, 1.0) is None
    told = str(health.judge(2, math.inf, math.nan))
    assert "step 2: loss inf, gradient norm nan; the update was not applied (1 in a row" in told
    assert health.judge(3, 2.5, 1.0) is None
    assert health.judge(4, 2.0, math.inf) is not None
    with pytest.raises(NonFiniteLossError, match=r"2 in a row. Last good values: step 3, train/loss 2.5"):
        health.judge(5, 2.0, math.nan)
    assert health.skipped == 3


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    layer, step = nn.Linear(3, 2), single_process(torch.device("cpu")).step
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    for bad in (math.nan, math.inf):
        layer(torch.full((1, 3), bad)).sum().backward()
        norm = step.update(layer, optimizer, list(layer.parameters()), max_norm=1.0)
        assert not math.isfinite(norm) and not optimizer.state
        assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
        assert all(parameter.grad is None for parameter in layer.parameters())


def test_a_loss_that_is_not_finite_has_no_finite_gradient() -> None:
    """Of a target of probability 0 it would be finite; of a finite loss it stays what it is, to the bit."""
    for logit, finite in ((-math.inf, False), (0.3, True)):
        logits = torch.tensor([[0.5, 1.5, logit]], requires_grad=True)
        loss = nn.functional.cross_entropy(logits, torch.tensor([2]))
        (plain,) = torch.autograd.grad(loss, logits, retain_graph=True)
        (spoiled,) = torch.autograd.grad(spoil_gradient(loss), logits)
        assert plain.isfinite().all() and bool(loss.isfinite()) == finite
        assert torch.equal(plain, spoiled) if finite else spoiled.isnan().all()


def test_a_skipped_merge_follows_the_next_step() -> None:
    config = LoQTConfig(rank=4, merge=MergeConfig(gap=5, schedule="constant"))
    layer = LoQTLinear(16, 8, bias=False, config=config)
    model = nn.Sequential(layer)
    optimizer = torch.optim.AdamW([layer.factor], lr=0.01)
    merges = MergeCoordinator(model, optimizer, config, total_steps=20)
    assert merges.steps[0] == 0
    merges.prepare(0)
    model(torch.full((2, 16), math.nan)).sum().backward()
    merges.postpone(0)
    assert layer.probe is None and merges.finish(0) is None and merges.is_merge_step(1)
    merges.prepare(1)
    model(torch.randn(2, 16)).sum().backward()
    report = merges.finish(1)
    assert report is not None and report.index == 0 and math.isfinite(report.means()["gradient_energy"])
    again = MergeCoordinator(model, optimizer, config, total_steps=20)  # a run that resumes after step 1
    again.require(1)
    assert again.is_merge_step(1)
