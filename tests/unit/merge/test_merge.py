"""The merge on one device: against an independent float64 implementation, and free of the reference's known faults."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from loqt_scale import LoQTConfig, MergeConfig, QuantizationConfig, convert_to_loqt
from loqt_scale.config import SubspaceMethod
from loqt_scale.layers import loqt_layers
from tests.unit.merge.small import RANK, Small, config, loss_of, make, train


@pytest.mark.parametrize("method", ["sketch", "svd"])
def test_factorising_in_the_backward_pass_changes_no_bit(method: SubspaceMethod) -> None:
    """In the last of two backward passes, so that the sketches of both count; and each is freed at once."""
    states = []
    for passes in (None, 2):
        model, merges, optimizer = make(config(method))
        for step in range(3):
            merges.prepare(step, backward_passes=passes)
            probes = [layer.probe for _, layer in loqt_layers(model)]
            for half in (0, 1):
                loss_of(model, 2 * step + half).backward()
            if merges.is_merge_step(step):
                held = [probe is not None and probe.leaf.grad is not None for probe in probes]
                assert held == [passes is None] * len(probes)
            optimizer.step()
            merges.finish(step)
            optimizer.zero_grad()
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_gradient_that_is_not_finite_is_left_for_the_trainer_to_judge() -> None:
    model, merges, optimizer = make(config("sketch"))
    merges.prepare(0, backward_passes=1)
    (loss_of(model, 0) * float("nan")).backward()
    merges.postpone(0)
    optimizer.zero_grad()
    assert merges.is_merge_step(1) and not merges.is_merge_step(0)
    merges.prepare(1, backward_passes=1)
    loss_of(model, 1).backward()
    report = merges.finish(1)
    assert report is not None and report.means()["gradient_energy"] > 0.0


def test_compensation_lowers_the_error_in_every_layer_of_every_merge() -> None:
    model, merges, optimizer = make(config("sketch"))
    for step in range(16):
        merges.prepare(step)
        loss_of(model, step).backward()
        optimizer.step()
        report = merges.finish(step)
        optimizer.zero_grad()
        if report is not None:
            for name, layer in report.layers.items():
                assert layer["error_after"] < 0.95 * layer["error_before"], (step, name)


@pytest.mark.parametrize("policy", ["keep", "reset", "transport"])
def test_it_learns_under_every_policy(policy: str) -> None:
    model, merges, optimizer = make(config("sketch", optimizer_state=policy))
    losses = train(model, merges, optimizer, range(60))
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


def test_merging_keeps_the_function_up_to_quantization() -> None:
    model, merges, optimizer = make(config("sketch"))
    train(model, merges, optimizer, range(5))
    merges.prepare(5)
    loss_of(model, 5).backward()
    optimizer.step()
    before = float(loss_of(model, 99))
    merges.finish(5)
    assert float(loss_of(model, 99)) == pytest.approx(before, rel=0.05)


def test_without_quantization_a_merge_changes_nothing_but_the_subspace() -> None:
    """LoQT-nq: W absorbs the update exactly."""
    plain = QuantizationConfig(weight="none", projection="none")
    settings = LoQTConfig(rank=RANK, quantization=plain, merge=MergeConfig(gap=5, schedule="constant"))
    model, merges, optimizer = make(settings)
    train(model, merges, optimizer, range(5))
    merges.prepare(5)
    loss_of(model, 5).backward()
    optimizer.step()
    before = {name: layer.effective_weight() for name, layer in loqt_layers(model)}
    report = merges.finish(5)
    for name, layer in loqt_layers(model):
        torch.testing.assert_close(layer.effective_weight(), before[name], rtol=1e-5, atol=1e-6)
    assert report is not None and report.means()["update_survival"] == pytest.approx(1.0, abs=1e-4)


def test_a_merge_uses_no_global_randomness() -> None:
    for method in ("sketch", "randomized", "svd"):
        model, merges, optimizer = make(config(method))  # type: ignore[arg-type]
        before = torch.get_rng_state()
        merges.prepare(0)
        loss_of(model, 0).backward()
        optimizer.step()
        merges.finish(0)
        assert torch.equal(torch.get_rng_state(), before), method


def test_biases_go_on_training_after_merges() -> None:
    model, merges, optimizer = make(config("sketch"))
    train(model, merges, optimizer, range(6))
    assert isinstance(model.up.bias, Tensor)
    before = model.up.bias.detach().clone()
    train(model, merges, optimizer, range(6, 8))
    assert not torch.equal(model.up.bias, before)


def test_evaluation_while_a_merge_is_pending_changes_nothing() -> None:
    """The reference's adapters stay off for good after it; ours must not even differ in the last bit."""
    runs = []
    for evaluating in (False, True):
        model, merges, optimizer = make(config("sketch"))
        for step in range(12):
            merges.prepare(step)
            loss = loss_of(model, step)
            if evaluating:
                model.eval()
                with torch.no_grad():
                    loss_of(model, 1000)
                model.train()
            loss.backward()
            optimizer.step()
            if evaluating:
                with torch.no_grad():
                    loss_of(model, 1000)
            merges.finish(step)
            optimizer.zero_grad()
        runs.append(torch.cat([p.detach().double().flatten() for p in model.parameters()]))
    assert torch.equal(*runs)


def test_probes_are_gone_and_nothing_dense_stays_after_a_merge() -> None:
    model, merges, optimizer = make(config("svd"))
    train(model, merges, optimizer, range(1))
    for _, layer in loqt_layers(model):
        assert layer.probe is None
        dense = layer.in_features * layer.out_features
        held = sum(v.numel() for v in vars(layer).values() if isinstance(v, Tensor))
        assert held < dense


def test_finish_without_prepare_says_what_to_do() -> None:
    _, merges, _ = make(config("sketch"))
    with pytest.raises(RuntimeError, match=r"call prepare\(step\) before the forward"):
        merges.finish(0)
    assert merges.finish(1) is None


def test_gradient_checkpointing_inside_a_merge_step() -> None:
    results = []
    for checkpointed in (False, True):
        model, merges, optimizer = make(config("sketch"))
        if checkpointed:
            inner = model.up.forward
            model.up.forward = lambda x, inner=inner: torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)  # type: ignore[method-assign]
        train(model, merges, optimizer, range(6))
        results.append(float(loss_of(model, 50)))
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_no_linear_matches() -> None:
    with pytest.raises(ValueError, match=r"loqt\.target_modules \['nope'\].*matches no linear.*square"):
        convert_to_loqt(Small(), LoQTConfig(rank=4, target_modules=["nope"]))


def test_names_choose_layers_and_tied_weights_are_left_alone() -> None:
    model = Small()
    model.lm_head.weight = model.embed.weight
    assert convert_to_loqt(model, LoQTConfig(rank=4, target_modules=["*"], exclude_modules=[])) == [
        "square",
        "up",
        "down",
    ]
    other = Small()
    assert convert_to_loqt(other, LoQTConfig(rank=4, target_modules=["up", "lm*"], exclude_modules=[])) == [
        "up",
        "lm_head",
    ]
    with pytest.raises(ValueError, match=r"loqt\.rank is 60, but square is 48 x 48; write 48 or less"):
        convert_to_loqt(Small(), LoQTConfig(rank=60))


@pytest.mark.parametrize("passes", [None, 1])
def test_a_merge_keeps_nothing_alive(passes: int | None) -> None:
    """Python's garbage collector does not see through the hooks of a tensor: they must be gone."""
    model, merges, optimizer = make(config("sketch"))
    merges.prepare(0, backward_passes=passes)
    loss_of(model, 0).backward()
    optimizer.step()
    merges.finish(0)
    there = weakref.ref(model)
    del model, merges, optimizer
    gc.collect()
    assert there() is None
