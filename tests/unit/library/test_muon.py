"""Muon for a loop of one's own: refused where it would train nothing, or run before it knows the ranks."""

from __future__ import annotations

import pytest
import torch

from loqt_scale import attach, convert_to_loqt, muon
from loqt_scale.errors import UserError
from tests.distributed.adopted_tasks import Small, batch, config, loss_of


def test_the_factors_take_muons_step_and_the_rest_adams() -> None:
    """Its step is orthogonal: all singular values of B's first update are near 0.2 sqrt(max(N, r)) of the rate."""
    torch.manual_seed(0)
    model, settings = Small(), config("none")
    convert_to_loqt(model, settings)
    optimizer = muon(model, lr=1e-2, full_precision_lr=1e-3)
    merges = attach(model, optimizer, settings)
    embedding = model.embed.weight.detach().clone()
    for _ in range(2):  # P is zero before the first merge
        merges.prepare()
        loss_of(model, batch(0)).backward()
        before = model.blocks[0].up.factor.detach().clone()
        optimizer.step()
        after = model.blocks[0].up.factor.detach().clone()
        merges.finish()
        optimizer.zero_grad()
    values = torch.linalg.svdvals(after - before) / (1e-2 * 0.2 * 86**0.5)
    assert float(values.min()) > 0.5 and float(values.max()) < 1.4
    assert float((model.embed.weight.detach() - embedding).abs().max()) < 2.1e-3  # two steps of Adam
    names = {len(optimizer.state[p]) for p in (model.blocks[0].up.factor, model.embed.weight)}
    assert names == {2, 3}  # the count, and one moment or two


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"no LoQT layer; convert_to_loqt\(model, config\) comes first"):
        muon(Small(), lr=1e-2)
    model = Small()
    convert_to_loqt(model, config("none"))
    with pytest.raises(UserError, match=r"has rank \d+; write ranks from 32 to 256"):
        muon(model, lr=1e-2, states="int8")
    dense = muon(Small(), lr=1e-2, dense_layers=["blocks.0.up"])
    assert [len(group["params"]) for group in dense.param_groups] == [1, 7]


def test_a_group_that_is_added_is_trained_and_saved_and_a_stranger_is_refused() -> None:
    model = Small()
    model.lm_head.requires_grad_(False)
    optimizer = muon(model, lr=1e-2, dense_layers=["blocks.0.up"])
    model.lm_head.requires_grad_(True)
    optimizer.add_param_group({"params": [model.lm_head.weight], "lr": 1e-3})
    before = model.lm_head.weight.detach().clone()
    loss_of(model, batch(0)).backward()
    optimizer.step()
    assert 0.0 < float((model.lm_head.weight.detach() - before).abs().max()) < 1.1e-3  # Adam's first step
    saved = optimizer.state_dict()
    assert len(saved["state"]) == 8 and not saved["param_groups"][2]["muon"]
    optimizer.load_state_dict(saved)
    flat = torch.nn.Parameter(model.blocks[0].up.weight.detach().flatten())
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]  # as an engine does
    with pytest.raises(UserError, match=r"a tensor \(4128,\) in the place of .*place\(model_or_engine, optimizer\)"):
        optimizer.step()


def test_a_parameter_that_is_one_number_is_trained() -> None:
    """A temperature, say."""
    model = Small()
    model.register_parameter("temperature", torch.nn.Parameter(torch.tensor(1.0)))
    settings = config("none")
    convert_to_loqt(model, settings)
    optimizer = muon(model, lr=1e-2)
    merges = attach(model, optimizer, settings, total_steps=2)
    merges.prepare()
    (loss_of(model, batch(0)) * model.temperature).backward()
    optimizer.step()
    merges.finish()
    assert float(model.temperature.detach()) == pytest.approx(0.99)  # Adam's first step
    optimizer.load_state_dict(optimizer.state_dict())
