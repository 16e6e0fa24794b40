"""What a loop of one's own may forget or confuse: each is repaired with a warning, or refused with what to write."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from loqt_scale import LoQTConfig, MergeConfig, MergeCoordinator, attach, convert_to_loqt
from loqt_scale.errors import UserError
from loqt_scale.layers import loqt_layers
from loqt_scale.layers.layer import BLANK_PASSES
from tests.unit.merge.small import RANK, SKETCH, Small, bases, loss_of

Optimizer = torch.optim.Optimizer


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def converted(settings: LoQTConfig = SKETCH) -> Small:
    torch.manual_seed(0)
    model = Small()
    convert_to_loqt(model, settings)
    return model


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(trained(model), lr=1e-2)


def step(model: nn.Module, merges: MergeCoordinator, optimizer: Optimizer, number: int | None, data: int) -> Any:
    merges.prepare(number)
    loss_of(model, data).backward()
    optimizer.step()
    report = merges.finish(number)
    optimizer.zero_grad()
    return report


def test_an_optimizer_from_before_the_conversion_is_refused() -> None:
    model = Small()
    optimizer = adamw(model)
    convert_to_loqt(model, SKETCH)
    with pytest.raises(UserError, match=r"(?s)factors of 3 of 3 LoQT layers .* torch\.optim\.AdamW\(\[p for p in"):
        attach(model, optimizer, SKETCH)
    attach(model, torch.optim.AdamW(model.parameters()), SKETCH)  # frozen ones in it do no harm
    factors = [layer.factor for _, layer in loqt_layers(model)]
    rest = [p for p in trained(model) if all(p is not factor for factor in factors)]
    both = [torch.optim.Muon(factors, lr=1e-2), torch.optim.AdamW(rest)]
    attach(model, both, SKETCH)
    with pytest.raises(UserError, match="factors"):
        attach(model, both[1], SKETCH)


def test_a_config_that_is_not_the_models_is_refused() -> None:
    model = converted()
    with pytest.raises(UserError, match=r"scale 0\.5, but the config says 0\.25"):
        attach(model, adamw(model), LoQTConfig(rank=RANK, scale=0.25))
    with pytest.raises(UserError, match="no LoQT layer"):
        attach(Small(), adamw(Small()), SKETCH)


@pytest.mark.parametrize("start", [1, 3])
def test_a_run_that_counts_from_elsewhere_has_its_first_merge_all_the_same(start: int) -> None:
    model = converted()
    optimizer = adamw(model)
    merges = attach(model, optimizer, SKETCH, total_steps=50)
    with pytest.warns(UserWarning, match="first merge, which belongs to step 0"):
        first = step(model, merges, optimizer, start, start)
    assert first is not None and all(bool(basis.any()) for basis in bases(model))
    merged = [n for n in range(start + 1, 12) if step(model, merges, optimizer, n, n) is not None]
    assert merged == [5, 10]


def test_steps_that_are_left_out_or_go_back() -> None:
    model = converted()
    optimizer = adamw(model)
    merges = attach(model, optimizer, SKETCH)
    step(model, merges, optimizer, 0, 0)
    with pytest.warns(UserWarning, match="merge of step 10 follows step 12"):
        assert step(model, merges, optimizer, 12, 1) is not None
    with pytest.raises(RuntimeError, match=r"step 0 comes after step 12.*leave them out"):
        merges.prepare(0)


def test_prepare_and_finish_that_are_forgotten() -> None:
    for number in (None, 1):  # counted here, and by the loop
        model = converted()
        optimizer = adamw(model)
        merges = attach(model, optimizer, SKETCH)
        with pytest.raises(RuntimeError, match="call prepare"):
            merges.finish()
        merges.prepare()
        merges.prepare()  # again: the step is the same, and so are the probes
        loss_of(model, 0).backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match=r"finish\(0\) was never called"):
            merges.prepare(number)
        assert merges.finish() is not None and merges.position == 1
        assert all(layer.probe is None for _, layer in loqt_layers(model))


def test_passes_that_do_not_come_as_they_were_told() -> None:
    """More or fewer than `backward_passes`: of one process the sums are the same."""
    found = []
    for told in (None, 1, 3):
        model = converted()
        optimizer = adamw(model)
        merges = attach(model, optimizer, SKETCH)
        merges.prepare(backward_passes=told)
        for data in (0, 1):
            loss_of(model, data).backward()
        optimizer.step()
        if told == 1:
            with pytest.raises(RuntimeError, match=r"more backward passes than prepare\(backward_passes=1\)"):
                merges.finish()
            continue
        merges.finish()
        found.append(bases(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_without_a_coordinator_it_is_said_once() -> None:
    model = converted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(BLANK_PASSES - 1):
            loss_of(model, 0)
    with pytest.warns(UserWarning, match="nothing merges") as told:
        loss_of(model, 0)
    assert len(told) == 3  # layers
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(model, 0)


@pytest.mark.parametrize("poison", [float("inf"), float("nan"), 0.0])
def test_a_merge_waits_for_gradients_that_are_finite_and_not_zero(poison: float) -> None:
    """As after a step that a gradient scaler skips: P stays, and the next step merges."""
    model = converted()
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    merges = attach(model, optimizer, SKETCH)
    for number in range(5):
        step(model, merges, optimizer, None, number)
    before = bases(model)
    merges.prepare()
    (loss_of(model, 5) * poison).backward()
    with pytest.warns(UserWarning, match="merge of step 5 is postponed to step 6: the gradients of"):
        assert merges.finish() is None
    optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(before, bases(model), strict=True))
    report = step(model, merges, optimizer, None, 6)
    assert report is not None and report.step == 6 and report.index == 1
    assert not any(torch.equal(a, b) for a, b in zip(before, bases(model), strict=True))


def test_a_merge_waits_for_the_optimizers_step() -> None:
    model = converted()
    optimizer = adamw(model)
    merges = attach(model, optimizer, SKETCH)
    for number in range(5):
        step(model, merges, optimizer, None, number)
    merges.prepare()
    loss_of(model, 5).backward()
    with pytest.warns(UserWarning, match=r"no step between prepare and finish"):
        assert merges.finish() is None


def test_a_merge_step_of_which_no_layer_saw_a_pass_is_an_error() -> None:
    model = converted()
    merges = attach(model, adamw(model), SKETCH)
    merges.prepare()
    with pytest.raises(RuntimeError, match="no LoQT layer was in a backward pass"):
        merges.finish()


def test_factors_of_16_bits_without_float32_copies_are_said() -> None:
    torch.manual_seed(0)
    model = Small().bfloat16()
    convert_to_loqt(model, SKETCH)
    with pytest.warns(UserWarning, match=r"factors are bfloat16 .* model\.float\(\) before convert_to_loqt"):
        attach(model, adamw(model), SKETCH).prepare()


def test_weights_that_are_lost_are_said_and_no_error_is_reported_of_them() -> None:
    model = converted()
    optimizer = adamw(model)
    with pytest.warns(UserWarning, match=r"lost.*before = model\.state_dict\(\)"):
        merges = attach(model, optimizer, SKETCH)
    assert "error_before" not in step(model, merges, optimizer, None, 0).means()


@pytest.mark.parametrize("scale", [0.25, 0.5])
def test_a_state_dict_says_by_which_scale_it_was_made(scale: float) -> None:
    saved = converted().state_dict()
    model = converted(LoQTConfig(rank=RANK, scale=scale))
    if scale == 0.5:
        model.load_state_dict(saved)
    else:
        with pytest.raises(RuntimeError, match=r"saved with scale 0\.5, but has 0\.25"):
            model.load_state_dict(saved)
    model.load_state_dict({name: tensor for name, tensor in saved.items()})


# ---- a run that goes on ----------------------------------------------------------------------------------------------


def run(model: Small, merges: MergeCoordinator, optimizer: Optimizer, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        number = merges.position
        merges.prepare(backward_passes=2)
        loss = loss_of(model, 2 * number) + loss_of(model, 2 * number + 1)
        for data in (2 * number, 2 * number + 1):
            loss_of(model, data).backward()
        if number != 5:  # a merge that is postponed
            optimizer.step()
        merges.finish()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.filterwarnings("ignore:LoQT")
def test_a_run_goes_on_bit_for_bit_wherever_it_was_cut() -> None:
    """Before, at and after merges, one of them postponed; the state is plain data."""
    settings = LoQTConfig(rank=RANK, merge=MergeConfig(gap=5, schedule="constant"))
    torch.manual_seed(0)
    first = Small()
    weights = first.state_dict()
    convert_to_loqt(first, settings)
    optimizer = adamw(first)
    merges = attach(first, optimizer, settings, initial_weights=weights)
    saved, losses = [], []
    for _ in range(12):
        saved.append(json.loads(json.dumps(merges.state_dict())))
        states = (first.state_dict(), optimizer.state_dict())
        saved[-1] = (saved[-1], *(json_free(state) for state in states))
        losses += run(first, merges, optimizer, 1)
    for cut in (0, 1, 5, 6, 7, 10, 11):
        model = converted(settings)
        other = adamw(model)
        position, tensors, moments = saved[cut]
        model.load_state_dict(tensors)
        other.load_state_dict(moments)
        again = attach(model, other, settings, initial_weights=weights)
        again.load_state_dict(position)
        assert run(model, again, other, 12 - cut) == losses[cut:], cut


def json_free(state: Any) -> Any:
    import copy

    return copy.deepcopy(state)


def test_a_state_of_other_settings_is_refused() -> None:
    model = converted()
    state = attach(model, adamw(model), SKETCH, seed=1).state_dict()
    other = attach(model, adamw(model), SKETCH, seed=2)
    with pytest.raises(UserError, match="seed was 1 and is 2"):
        other.load_state_dict(state)
    with pytest.warns(UserWarning, match="seed was 1 and is 2"):
        other.load_state_dict(state, strict=False)
    narrow = converted(LoQTConfig(rank=4))
    with pytest.raises(UserError, match=r"had rank 8 and has 4"):
        attach(narrow, adamw(narrow), LoQTConfig(rank=4)).load_state_dict(state, strict=False)


def test_a_state_inside_a_merge_step_is_that_of_its_beginning_up_to_the_update() -> None:
    model = converted()
    optimizer = adamw(model)
    merges = attach(model, optimizer, SKETCH)
    for index in range(5):
        step(model, merges, optimizer, None, index)
    before = merges.state_dict()
    merges.prepare()
    loss_of(model, 5).backward()
    assert merges.state_dict() == before and merges.is_merge_step(5)  # Lightning saves in the middle of accumulations
    optimizer.step()
    with pytest.raises(RuntimeError, match="call finish before state_dict"):
        merges.state_dict()


def test_initial_weights_in_one_word(tmp_path: Any) -> None:
    """A state dict, a model or a folder: one first merge. A wrong one is refused at once."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    before = Small()
    save_file(before.state_dict(), tmp_path / "model.safetensors")
    found = []
    for given in (before.state_dict(), before, tmp_path, str(tmp_path)):
        model = converted()
        optimizer = adamw(model)
        report = step(model, attach(model, optimizer, SKETCH, initial_weights=given), optimizer, None, 0)
        found.append(report.means()["error_before"])
    assert found[0] > 0.0 and found == found[:1] * 4
    model = converted()
    for wrong, said in ((model, "no square.weight"), (str(tmp_path / "no"), "no folder"), (3, "is a int")):
        with pytest.raises(UserError, match=said):
            attach(model, adamw(model), SKETCH, initial_weights=wrong)  # type: ignore[arg-type]


def test_a_step_that_is_a_tensor_is_its_number_then() -> None:
    model, number = converted(), torch.tensor(0)
    optimizer = adamw(model)
    merges = attach(model, optimizer, SKETCH, total_steps=50)
    merged = []
    for n in range(11):
        merged += [n] if step(model, merges, optimizer, number, n) is not None else []  # type: ignore[arg-type]
        number += 1
    assert merged == [0, 5, 10] and json.dumps(merges.state_dict())
