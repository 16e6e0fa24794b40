"""Loops that freeze, roll back, fail in the middle, or set torch's defaults."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import loqt_scale
from loqt_scale import LoQTConfig, MergeConfig, MergeCoordinator, SubspaceConfig, attach, convert_to_loqt, to_dense
from loqt_scale.errors import UserError
from loqt_scale.layers import loqt_layers
from loqt_scale.merge.one_layer import LayerMerge
from tests.unit.merge.small import RANK, SKETCH, Small, attached, loss_of, same, step

pytestmark = pytest.mark.filterwarnings("ignore:LoQT. what quantization")


def test_frozen_layers_rest_until_they_train_again() -> None:
    model, optimizer, merges = attached()
    for data in range(3):
        step(model, optimizer, merges, data)
    model.up.factor.requires_grad_(False)
    before = copy.deepcopy(model.up.state_dict())
    reports = [step(model, optimizer, merges, data) for data in range(3, 7)]
    assert reports[2].kept == ("up",)
    after = model.up.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name != "bias")
    model.up.factor.requires_grad_(True)
    reports = [step(model, optimizer, merges, data) for data in range(7, 11)]
    assert reports[3].kept == () and not torch.equal(before["projection.codes"], model.up.projection.codes)
    for _, layer in loqt_layers(model):
        layer.factor.requires_grad_(False)
    assert all(step(model, optimizer, merges, data) is None for data in range(11, 17))


def test_a_layer_that_trains_again_and_that_no_optimizer_holds_is_refused() -> None:
    model, _, _ = attached()
    model.up.factor.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    merges = attach(model, optimizer, SKETCH)
    model.up.factor.requires_grad_(True)
    with pytest.raises(UserError, match=r"factors of 1 of 3 LoQT layers \(up, say\)"):
        step(model, optimizer, merges, 0)


def test_finish_that_raised_is_taken_up_again_or_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    run = LayerMerge.run
    for fails in (False, True):
        model, optimizer, merges = attached()
        merges.prepare()
        loss_of(model, 0).backward()
        optimizer.step()
        if fails:

            def once(self: LayerMerge, name: str, *rest: Any) -> Any:
                if name == "up":
                    raise MemoryError("no room")
                return run(self, name, *rest)

            monkeypatch.setattr(LayerMerge, "run", once)
            with pytest.raises(MemoryError):
                merges.finish()
            with pytest.raises(RuntimeError, match=r"finish\(0\) was never called, or raised.*merges\.postpone\(0\)"):
                merges.prepare()
            monkeypatch.setattr(LayerMerge, "run", run)
        results.append((merges.finish(), model))
    assert str(results[0][0].layers) == str(results[1][0].layers)
    assert same(results[0][1], results[1][1])
    model, optimizer, merges = attached()
    merges.prepare(backward_passes=1)
    for data in range(2):
        loss_of(model, data).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="more backward passes"):
        merges.finish()
    assert step(model, optimizer, merges, 1).step == 1


def test_a_rollback_inside_a_merge_step_repeats_the_same_steps() -> None:
    model, optimizer, merges = attached()
    for data in range(4):
        step(model, optimizer, merges, data)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), merges.state_dict()))
    ends = []
    for _ in range(2):
        for data in range(4, 7):
            step(model, optimizer, merges, data)
        ends.append(copy.deepcopy(model))
        for thing, state in zip((model, optimizer, merges), copy.deepcopy(saved), strict=True):
            thing.load_state_dict(state)
        step(model, optimizer, merges, 4)
        merges.prepare()
        loss_of(model, 99).backward()
        assert all(layer.probe is None for _, layer in loqt_layers(copy.deepcopy(model)))
        with pytest.warns(UserWarning, match="postponed to step 6"):
            merges.finish()
        merges.prepare()
        for thing, state in zip((model, optimizer, merges), copy.deepcopy(saved), strict=True):
            thing.load_state_dict(state)
        optimizer.zero_grad()
    assert same(*ends)


def test_total_steps_are_checked_and_their_end_is_told_once() -> None:
    model, optimizer, _ = attached()
    for wrong in (0, -3, 2.5, "8", True):
        with pytest.raises(UserError, match=r"total_steps is .*1 or more"):
            attach(model, optimizer, SKETCH, total_steps=wrong)  # type: ignore[arg-type]
    merges = attach(model, optimizer, SKETCH, total_steps=2)
    with pytest.warns(UserWarning, match="step 2 comes after the 2 steps") as told:
        for data in range(7):
            step(model, optimizer, merges, data)
    assert len([each for each in told if "comes after" in str(each.message)]) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_defaults_change_nothing(dtype: torch.dtype) -> None:
    from loqt_scale.functional import blockwise, nf4_cpu

    ends = []
    for changed in (False, True):
        model, optimizer, merges = attached()
        try:
            torch.set_default_dtype(dtype if changed else torch.float32)
            nf4_cpu._tables.cache_clear()
            blockwise.level_tables.cache_clear()
            for data in range(6):
                merges.prepare()
                loss_of(model, data).backward()
                optimizer.step()
                torch.set_default_device("meta" if changed else "cpu")
                merges.finish()
                torch.set_default_device("cpu")
                optimizer.zero_grad()
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device("cpu")
        ends.append(model)
    assert same(*ends)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (LoQTConfig(rank=4), "rank 8, but the config says 4"),
        (LoQTConfig(rank=RANK, side="input"), "side 'output', but the config says 'input'"),
        (
            LoQTConfig(rank=RANK, quantization=loqt_scale.QuantizationConfig(block_size=32)),
            "block_size 64, but the config says 32",
        ),
    ],
)
def test_a_config_of_other_sizes_is_refused(settings: LoQTConfig, said: str) -> None:
    model, optimizer, _ = attached()
    with pytest.raises(UserError, match=said):
        attach(model, optimizer, settings)


def test_arguments_of_another_kind_are_named() -> None:
    model, optimizer, _ = attached()
    wrong: Any
    for wrong, said in (("m", "the model is a str"), (Small, "the model is the class Small")):
        for call in (lambda w: convert_to_loqt(w, SKETCH), lambda w: attach(w, optimizer, SKETCH)):
            with pytest.raises(UserError, match=said):
                call(wrong)
    for wrong in ({"rank": 8}, None):
        with pytest.raises(UserError, match=r"the config is .*LoQTConfig\(rank=128\)"):
            MergeCoordinator(model, optimizer, wrong)
    for wrong, said in ((None, "is None"), (torch.optim.AdamW, "the class AdamW"), (model.parameters(), "a generator")):
        with pytest.raises(UserError, match=f"the optimizer .*{said}"):
            attach(model, wrong, SKETCH)
    assert {"attach", "LoQTCallback", "to_dense"} <= set(dir(loqt_scale))


def test_optimizers_with_states_of_their_own_kind() -> None:
    with pytest.raises(UserError, match=r"LBFGS .*AdamW"):
        attached(torch.optim.LBFGS)
    _, optimizer, _ = run = attached(torch.optim.Adagrad, initial_accumulator_value=0.1)
    step(*run, 0)
    assert all(float(state["sum"].min()) >= 0.0999 for state in optimizer.state.values())
    for flag in ("foreach", "fused"):
        step(*attached(**{flag: True}), 0)
    model, optimizer, merges = attached()
    for data in range(6):
        merges.prepare()

        def closure(data: int = data) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, data)
            loss.backward()
            return loss

        optimizer.step(closure)
        assert (merges.finish() is None) == (data not in (0, 5))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("side", ["input", "output"])
def test_second_derivatives_are_right_or_refused(side: Any) -> None:
    settings = LoQTConfig(rank=RANK, side=side, merge=MergeConfig(gap=5))
    model, optimizer, merges = attached(settings=settings)
    for data in range(2):
        step(model, optimizer, merges, data)
    model.double()
    factors = [layer.factor for _, layer in loqt_layers(model)]
    vectors = [torch.randn_like(factor) for factor in factors]
    first = torch.autograd.grad(loss_of(model, 1), factors, create_graph=True)
    product = sum((a * b).sum() for a, b in zip(first, vectors, strict=True))
    x = torch.randn(3, 48, dtype=torch.float64, requires_grad=True)
    (by_input,) = torch.autograd.grad(model.square(x).sum(), x, create_graph=True)
    by_input.square().sum().backward()  # a penalty on gradients by inputs
    if side == "input":
        with pytest.raises(UserError, match=r"second derivatives .*side='output'.*to_dense"):
            torch.autograd.grad(product, factors)  # type: ignore[arg-type]
        both = nn.Sequential(model.up, model.down)  # and of a loss that is linear in the last layer's output
        last = torch.autograd.grad(both(x.detach()).sum(), model.down.factor, create_graph=True)[0]
        with pytest.raises(UserError, match="second derivatives"):
            torch.autograd.grad(last.square().sum(), [model.up.factor, model.down.factor])
        return
    found = torch.autograd.grad(product, factors)  # type: ignore[arg-type]
    ends = []
    for shift in (1e-5, -1e-5):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for (_, layer), vector in zip(loqt_layers(moved), vectors, strict=True):
                layer.factor.add_(vector, alpha=shift)
        ends.append(torch.autograd.grad(loss_of(moved, 1), [layer.factor for _, layer in loqt_layers(moved)]))
    for up, down, exact in zip(*ends, found, strict=True):
        torch.testing.assert_close((up - down) / 2e-5, exact, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("method", ["sketch", "svd"])
def test_probes_see_a_penalty_on_gradients_by_inputs(side: Any, method: Any) -> None:
    """Of energies and forces, say; beside the dense model's gradients, and the sketch of the same gradient alone."""
    settings = LoQTConfig(rank=RANK, side=side, subspace=SubspaceConfig(method=method))
    model, optimizer, merges = attached(settings=settings)
    step(model, optimizer, merges, 0)
    model.double()
    dense = to_dense(model)

    def penalty(net: Any) -> torch.Tensor:
        x = torch.linspace(-1.0, 1.0, 3 * 48, dtype=torch.float64).view(3, 48).requires_grad_()
        energy = net.down(torch.tanh(net.up(x + net.square(x)))).sum()  # linear in the last layer's output
        return torch.autograd.grad(energy, x, create_graph=True)[0].square().sum() + energy

    penalty(dense).backward()
    merges.require(1)
    merges.prepare()
    penalty(model).backward()
    for name, layer in loqt_layers(model):
        assert layer.probe is not None and layer.probe.leaf.grad is not None
        found, layer.probe.leaf.grad = layer.probe.leaf.grad, None
        gradient = dense.get_submodule(name).weight.grad
        (layer(torch.eye(gradient.shape[1], dtype=torch.float64)) * gradient.T).sum().backward()
        torch.testing.assert_close(found, layer.probe.leaf.grad, rtol=1e-5, atol=1e-5)


def test_whole_numbers_are_no_input() -> None:
    model, _, _ = attached()
    with pytest.raises(UserError, match=r"torch\.int64.*x\.float\(\)"):
        model.square(torch.ones(2, 48, dtype=torch.int64))


def test_a_loop_that_is_wholly_under_autocast_merges_in_float32() -> None:
    states = []
    for enabled in (False, True):
        model, optimizer, merges = attached()
        merges.prepare()
        loss_of(model, 0).backward()
        optimizer.step()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            merges.finish()
        states.append(model.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_a_model_that_is_a_linear_itself_is_refused() -> None:
    with pytest.raises(UserError, match=r"give nn\.Sequential\(model\)"):
        convert_to_loqt(nn.Linear(64, 64), SKETCH)


def test_a_run_without_an_end_merges_on() -> None:
    settings = LoQTConfig(rank=RANK, merge=MergeConfig(gap=3, growth=1.2))
    model, optimizer, endless = attached(settings=settings)
    ending = attach(model, optimizer, settings, total_steps=200)
    assert [step for step in range(200) if endless.is_merge_step(step)] == ending.steps
    with pytest.raises(UserError, match="last_step_fraction"):
        attached(settings=LoQTConfig(rank=RANK, merge=MergeConfig(last_step_fraction=0.9)))


def test_data_parallel_and_arguments_of_another_type_are_refused() -> None:
    model, optimizer, _ = attached()
    wrapped = nn.DataParallel(model)
    wrapped.device_ids = [0, 1]  # as with two GPUs
    with pytest.raises(UserError, match=r"in DataParallel.*DistributedDataParallel"):
        attach(wrapped, optimizer, SKETCH)
    with pytest.raises(UserError, match="the model is"):
        to_dense("m")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the config is"):
        loqt_scale.LoQTCallback(3)


def test_a_discriminator_that_was_prepared_too_early_is_told() -> None:
    """Its probes would hold the generator's gradients, which zero_grad takes out of everything else."""

    def found(late: bool) -> list[torch.Tensor]:
        model, optimizer, merges = attached()
        if not late:
            merges.prepare()
        (-loss_of(model, 7)).backward()  # the generator's pass
        optimizer.zero_grad()
        if late:
            merges.prepare()
        loss_of(model, 0).backward()
        optimizer.step()
        merges.finish()
        return [layer.projection.dense() for _, layer in loqt_layers(model)]

    model, optimizer, merges = attached()
    step(model, optimizer, merges, 0)
    right = [layer.projection.dense() for _, layer in loqt_layers(model)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*zero_grad")
        assert all(torch.equal(a, b) for a, b in zip(found(late=True), right, strict=True))
    with pytest.warns(UserWarning, match=r"before a zero_grad\(\).*discriminator's prepare\(\) after them"):
        assert not any(torch.equal(a, b) for a, b in zip(found(late=False), right, strict=True))
