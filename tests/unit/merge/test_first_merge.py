"""The first merge reads the true weights once more; a compensated start has made up for quantization before it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from loqt_scale import LoQTConfig, MergeConfig, MergeCoordinator, QuantizationConfig, convert_to_loqt
from loqt_scale.layers import LoQTLinear, loqt_layers
from loqt_scale.merge import one_layer
from tests.unit.merge.small import RANK, SCALE, Dense, Small, config, loss_of, make, train


class Counted(Dense):
    """Counts how often the true weights are read."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.read: list[str] = []

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        self.read.append(name)
        return super().rows(name, start, stop)


@pytest.mark.parametrize("gap", [1, 2, 5])
@pytest.mark.parametrize("resumed", [False, True])
def test_the_first_merge_reads_the_true_weights_whenever_it_comes(gap: int, resumed: bool) -> None:
    """Also if steps 0 and 1 were skipped, on whatever their merges fall, and if the run was resumed in between."""
    settings = LoQTConfig(rank=RANK, scale=SCALE, merge=MergeConfig(gap=gap, schedule="constant"))
    torch.manual_seed(0)
    model = Small()
    source = Counted(model)
    convert_to_loqt(model, settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def coordinator() -> MergeCoordinator:
        return MergeCoordinator(model, optimizer, settings, total_steps=100, seed=3, initial_weights=source)

    merges = coordinator()
    for step in (0, 1):
        merges.prepare(step)
        merges.postpone(step)
    assert merges.steps[:2] == [2, 2 + (gap if gap != 5 else 3)] and not source.read
    if resumed:
        merges = coordinator()
        merges.require(2)
    indices = []
    for step in range(2, 12):
        merges.prepare(step)
        loss_of(model, step).backward()
        report = merges.finish(step)
        optimizer.zero_grad()
        if report is not None:
            indices.append(report.index)
            assert len(source.read) == len(dict(loqt_layers(model))), step  # once, in the first
    assert indices == {1: list(range(2, 12)), 2: [1, 2, 3, 4, 5], 5: [0, 1, 2]}[gap]


@pytest.mark.parametrize("resumed", [False, True])
def test_a_postponed_merge_later_on_reads_them_no_more(resumed: bool) -> None:
    """The merge of the last step, too, may be postponed: to a step that comes if the run is extended."""
    model, merges, optimizer = make(config("sketch"))
    train(model, merges, optimizer, range(5))
    merges.prepare(5)
    merges.postpone(5)
    before = {name: layer.effective_weight() for name, layer in loqt_layers(model)}
    if resumed:
        source = Counted(Small())
        merges = MergeCoordinator(model, optimizer, config("sketch"), total_steps=100, initial_weights=source)
        merges.require(6)
    merges.prepare(6)
    loss_of(model, 6).backward()
    optimizer.step()
    report = merges.finish(6)
    assert report is not None and report.index == 1 and report.means()["subspace_overlap"] >= 0.0
    assert not resumed or not source.read
    for name, layer in loqt_layers(model):
        assert (layer.effective_weight() - before[name]).norm() < 0.2 * before[name].norm()
    merges.prepare(merges.steps[-1])
    merges.postpone(last := merges.steps[-1])
    assert merges.steps[-1] == last + 1


def compensated(**merge: object) -> LoQTConfig:
    return dataclasses.replace(config("sketch", **merge), init="loftq")


def test_a_compensated_start_lies_nearer_to_the_weights_than_quantization() -> None:
    model, merges, _ = make(compensated())
    torch.manual_seed(0)
    weights = Dense(Small()).weights
    bare = {name: layer.base.dense(torch.float32) for name, layer in loqt_layers(model)}
    report = merges.begin()
    assert report is not None and set(report.errors) == set(bare)
    for name, layer in loqt_layers(model):
        weight = weights[f"{name}.weight"]
        before, after = ((weight - w).norm() / weight.norm() for w in (bare[name], layer.effective_weight()))
        assert (float(before), float(after)) == pytest.approx(report.errors[name], rel=1e-3)
        assert after < 0.9 * before


@pytest.mark.parametrize("resumed", [False, True])
def test_its_first_merge_starts_from_the_true_weights_and_what_was_learnt(resumed: bool) -> None:
    """Not from the quantized ones with what makes up for them, whose error would stay. Steps may be skipped first."""
    model, merges, optimizer = make(compensated())
    torch.manual_seed(0)
    source = Counted(Small())
    merges.begin()
    before = {name: layer.effective_weight() for name, layer in loqt_layers(model)}
    merges.prepare(0)
    merges.postpone(0)  # a step that was skipped
    if resumed:
        merges = MergeCoordinator(model, optimizer, compensated(), total_steps=100, seed=3, initial_weights=source)
        merges.require(1)
        merges.expect_first_merge()
    merges.prepare(1)
    loss_of(model, 1).backward()
    optimizer.step()
    learnt = {name: layer.effective_weight() - before[name] for name, layer in loqt_layers(model)}
    merged: dict[str, Tensor] = {}
    original = one_layer.compensate

    def watched(weight: Tensor, *given: object, **more: object) -> object:
        merged[next(name for name, layer in loqt_layers(model) if name not in merged and same(layer, weight))] = (
            weight.clone()
        )
        return original(weight, *given, **more)  # type: ignore[arg-type]

    def same(layer: LoQTLinear, weight: Tensor) -> bool:
        return weight.shape == (layer.out_features, layer.in_features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_layer, "compensate", watched)
        report = merges.finish(1)
    assert report is not None and "update_survival" not in report.means() and "subspace_overlap" not in report.means()
    for name, weight in merged.items():
        expected = source.weights[f"{name}.weight"] + learnt[name]
        torch.testing.assert_close(weight, expected, rtol=0, atol=2e-6)
        assert learnt[name].norm() > 1e-3
    merges.prepare(5)
    loss_of(model, 5).backward()
    optimizer.step()
    again = merges.finish(5)
    assert again is not None and again.means()["update_survival"] > 0.0
    assert len(source.read) == (len(merged) if resumed else 0)  # the second merge reads them no more


def test_a_compensated_start_needs_the_weights_and_changes_nothing_where_the_base_is_exact() -> None:
    _, merges, _ = make(compensated(), true_weights=False)
    with pytest.raises(ValueError, match="initial_weights"):
        merges.begin()
    exact = dataclasses.replace(compensated(), quantization=QuantizationConfig(weight="none"))
    model, merges, _ = make(exact)
    report = merges.begin()
    assert report is not None and report.means() == {}
    assert not any(layer.factor.any() or layer.projection.dense(torch.float32).any() for _, layer in loqt_layers(model))
    assert make(config())[1].begin() is None
