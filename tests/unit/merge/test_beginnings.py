"""How runs begin and go on: states that were not loaded, layers that have no P yet, tensors that somebody casts."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from loqt_scale import LoQTConfig, MergeConfig, MergeCoordinator, attach, convert_to_loqt
from loqt_scale.errors import UserError
from loqt_scale.layers import loqt_layers
from tests.unit.merge.small import RANK, Small, config, loss_of, step

RARE = LoQTConfig(rank=RANK, merge=MergeConfig(gap=1000))
pytestmark = pytest.mark.filterwarnings("ignore:LoQT. what quantization rounded away")


def made(settings: LoQTConfig = RARE) -> tuple[Small, torch.optim.Optimizer, MergeCoordinator]:
    """A converted model, its optimizer, its merges, which know the weights before."""
    torch.manual_seed(0)
    model = Small()
    before = model.state_dict()
    convert_to_loqt(model, settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return model, optimizer, attach(model, optimizer, settings, initial_weights=before)


def without_basis(model: nn.Module) -> list[str]:
    return [name for name, layer in loqt_layers(model) if not layer.projection.dense().any()]


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: layer.factor for name, layer in loqt_layers(model)}


def test_merges_whose_state_was_not_loaded_say_so() -> None:
    model, optimizer, merges = made(config("sketch"))
    for data in range(7):
        step(model, optimizer, merges, data)
    states = [copy.deepcopy(thing.state_dict()) for thing in (model, optimizer, merges)]
    for loads in ("before attach", "after attach"):
        model, optimizer, merges = made(config("sketch"))
        model.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
        if loads == "before attach":
            merges = attach(model, optimizer, config("sketch"))
        with pytest.warns(UserWarning, match=r"merged before.*merges\.load_state_dict\(state\)"):
            merges.prepare()
        merges = attach(model, optimizer, config("sketch"))
        merges.load_state_dict(states[2])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert step(model, optimizer, merges, 7) is None and merges.position == 8


def test_a_compensated_start_does_not_undo_what_was_loaded() -> None:
    """Its first merge reads the weights from before anew, to which only B was added."""
    settings = LoQTConfig(rank=RANK, init="loftq", merge=MergeConfig(gap=5, schedule="constant"))
    model, optimizer, merges = made(settings)
    for data in range(7):
        step(model, optimizer, merges, data)
    states = [copy.deepcopy(thing.state_dict()) for thing in (model, optimizer, merges)]
    model, optimizer, merges = made(settings)
    model.load_state_dict(states[0])
    with pytest.raises(UserError, match=r"load the model before attach\(\)"):
        merges.prepare()
    merges.load_state_dict(states[2])
    optimizer.load_state_dict(states[1])
    for data in range(7, 10):
        assert step(model, optimizer, merges, data) is None
    before = float(loss_of(model, 3).detach())
    assert step(model, optimizer, merges, 10) is not None
    assert float(loss_of(model, 3).detach()) == pytest.approx(before, abs=0.3)


@pytest.mark.parametrize("how", ["the model's state was not loaded", "a learning-rate finder puts it back"])
def test_layers_that_lost_their_basis_get_one_at_once(how: str) -> None:
    model, optimizer, merges = made()
    fresh = [copy.deepcopy(thing.state_dict()) for thing in (model, optimizer)]
    for data in range(3):
        step(model, optimizer, merges, data)
    if how.startswith("the model"):
        state = merges.state_dict()
        model, optimizer, merges = made()
        merges.load_state_dict(state)
    else:
        model.load_state_dict(fresh[0])
        optimizer.load_state_dict(fresh[1])
    assert without_basis(model)
    with pytest.warns(UserWarning, match=r"P of 3 layer\(s\) that train is zero .* a merge follows step 3"):
        assert step(model, optimizer, merges, 3) is not None
    assert not without_basis(model) and step(model, optimizer, merges, 4) is None


@pytest.mark.parametrize("frozen", [["up"], ["square", "up", "down"]])
def test_layers_that_train_later_need_not_wait_for_a_planned_merge(frozen: list[str]) -> None:
    model, optimizer, merges = made()
    for name in frozen:
        factors(model)[name].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in range(34):  # more than the passes after which a layer says that nothing merges
            step(model, optimizer, merges, data)
    assert without_basis(model) == frozen
    model_state, state = model.state_dict(), merges.state_dict()
    merges = attach(model, optimizer, RARE)  # goes on in another process
    model.load_state_dict(model_state)
    merges.load_state_dict(state)
    for name in frozen:
        factors(model)[name].requires_grad_(True)
    with pytest.warns(UserWarning, match=rf"P of {len(frozen)} layer\(s\) .*{frozen[0]}, say: frozen till now"):
        assert step(model, optimizer, merges, 34) is not None
    assert not without_basis(model)


def test_factors_that_are_cast_later_are_told_of_too() -> None:
    model, _, merges = made()
    model.bfloat16()
    with pytest.warns(UserWarning, match="factors are bfloat16"):
        merges.prepare()


def test_a_model_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = Small()
    convert_to_loqt(model, RARE)
    with pytest.raises(UserError, match="meta device"):
        attach(model, torch.optim.AdamW(factors(model).values()), RARE)


@pytest.mark.parametrize("kind", ["shape", "projector"])
def test_moments_in_a_basis_of_the_optimizers_own_are_refused(kind: str) -> None:
    """GaLore's and APOLLO's: another shape, or the same one in other coordinates. Nothing has been changed then."""
    model, optimizer, merges = made()
    step(model, optimizer, merges, 0)
    state = optimizer.state[factors(model)["up"]]
    if kind == "shape":
        state["exp_avg"] = state["exp_avg"][:, : RANK // 2].clone()
    else:
        state["projector"] = object()
    merges.require(1)
    merges.prepare()
    loss_of(model, 1).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=f"keeps '{'exp_avg' if kind == 'shape' else 'projector'}'"):
        merges.finish()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
