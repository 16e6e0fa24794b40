"""Averages and copies of a converted model: what merges make of them, and what they make of the model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from loqt_scale import attach, to_dense
from tests.unit.merge.small import SKETCH, attached, same, step

pytestmark = pytest.mark.filterwarnings("ignore:LoQT. what quantization")


def test_averages_of_a_converted_model_are_told_and_those_of_dense_weights_are_right() -> None:
    model, optimizer, merges = attached()
    ema = get_ema_multi_avg_fn(0.9)
    packed, right = AveragedModel(model, multi_avg_fn=ema), AveragedModel(to_dense(model), multi_avg_fn=ema)
    oracle: dict[str, torch.Tensor] = {}
    with pytest.warns(UserWarning, match=r"AveragedModel\(to_dense\(model\)\)") as told:
        for data in range(7):
            step(model, optimizer, merges, data)
            packed.update_parameters(model)
            right.update_parameters(to_dense(model))
            now = {name: p.detach().double() for name, p in to_dense(model).named_parameters()}
            oracle = {name: 0.9 * oracle[name] + 0.1 * p for name, p in now.items()} if oracle else now
    assert len([each for each in told if "AveragedModel" in str(each.message)]) == 1
    for name, p in right.module.named_parameters():
        torch.testing.assert_close(p.double(), oracle[name], rtol=1e-5, atol=1e-6)


class ListAverage:
    """An average as a list of clones of parameters: what diffusers' EMAModel and torch_ema keep."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.kept: list[torch.Tensor] = []
        self.restart(parameters)

    def restart(self, parameters: Iterable[nn.Parameter]) -> None:
        self.kept = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        for kept, now in zip(self.kept, parameters, strict=True):
            kept.sub_(0.1 * (kept - now)) if now.requires_grad else kept.copy_(now)

    def copy_to(self, parameters: Iterable[nn.Parameter]) -> None:
        for kept, now in zip(self.kept, parameters, strict=True):
            now.data.copy_(kept)


def test_averages_in_a_list_of_parameters_are_of_dense_weights_or_begin_anew_at_merges() -> None:
    model, optimizer, merges = attached()
    dense, since, reports = ListAverage(to_dense(model).parameters()), ListAverage(model.parameters()), []
    merges.on_merge.append(lambda report: since.restart(model.parameters()))
    merges.on_merge.append(reports.append)
    from_start, from_merge = ([p.detach().double() for p in to_dense(model).parameters()] for _ in range(2))
    for data in range(9):
        report = step(model, optimizer, merges, data)
        assert (report is None) == (data not in (0, 5)) and (report is None or reports[-1] is report)
        dense.step(to_dense(model).parameters())
        since.step(model.parameters())
        now = [p.detach().double() for p in to_dense(model).parameters()]
        from_merge = now if report is not None else [0.9 * a + 0.1 * b for a, b in zip(from_merge, now, strict=True)]
        from_start = [0.9 * a + 0.1 * b for a, b in zip(from_start, now, strict=True)]
    other, before = to_dense(model), copy.deepcopy(model.state_dict())
    dense.copy_to(other.parameters())
    assert close(other, from_start) and not close(to_dense(model), from_start)
    since.copy_to(model.parameters())  # into the model that trains, and out again
    assert close(to_dense(model), from_merge)
    model.load_state_dict(before)
    assert not close(to_dense(model), from_merge)


def close(model: nn.Module, wanted: list[torch.Tensor]) -> bool:
    return all(torch.allclose(p.double(), w, 1e-4, 1e-5) for p, w in zip(model.parameters(), wanted, strict=True))


def test_copies_that_are_kept_or_loaded_or_trained_are_nobodys_mistake() -> None:
    model, optimizer, merges = attached()
    kept, target, twin = (copy.deepcopy(model) for _ in range(3))
    own = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2)
    its = attach(twin, own, SKETCH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in range(12):
            step(model, optimizer, merges, data)
            step(twin, own, its, data)
            if data % 3 == 0:
                target.load_state_dict(model.state_dict())
    assert same(model, twin) and not same(model, kept)
    other = target.state_dict()
    mean = {name: (value + other[name]) / 2 for name, value in kept.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"packed bytes.*Average the state dicts of to_dense\(model\)"):
        model.load_state_dict(mean)
