"""What a merge makes of the states of optimizers of every kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from loqt_scale.errors import UserError
from loqt_scale.layers import loqt_layers
from loqt_scale.optim import open_states
from tests.unit.merge.small import attached, bases, config, loss_of, step

Optimizer = torch.optim.Optimizer
pytestmark = pytest.mark.filterwarnings("ignore:LoQT. what quantization")


def eight_bits(parameters: list[nn.Parameter], lr: float) -> Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, lr=lr, min_8bit_size=1)


def adafactor(parameters: list[nn.Parameter], lr: float) -> Optimizer:
    from transformers import Adafactor

    return Adafactor(parameters, lr=lr, relative_step=False, scale_parameter=False)


CARRIED: dict[str, Callable[..., Optimizer]] = {
    "amsgrad": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, amsgrad=True),
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "adamax": lambda parameters, lr: torch.optim.Adamax(parameters, lr=lr),
    "rmsprop": lambda parameters, lr: torch.optim.RMSprop(parameters, lr=lr, momentum=0.9, centered=True),
    "torch adafactor": lambda parameters, lr: torch.optim.Adafactor(parameters, lr=lr),
    "transformers adafactor": adafactor,
    "adamw 8 bits": eight_bits,
}


def opened(optimizer: Optimizer, factor: nn.Parameter) -> list[tuple[str, Tensor]]:
    with open_states(optimizer, factor, lambda tensor: tensor) as states:
        return [(kind, state.clone()) for kind, state in states]


@pytest.mark.parametrize("name", CARRIED)
def test_states_are_carried_by_their_rule(name: str) -> None:
    """What a merge makes of each, beside its rule written out in float64."""
    model, optimizer, merges = attached(CARRIED[name])
    for number in range(5):
        step(model, optimizer, merges, number)
    merges.prepare()
    loss_of(model, 5).backward()
    optimizer.step()
    layers = dict(loqt_layers(model))
    before = {key: (layer.projection.dense(), opened(optimizer, layer.factor)) for key, layer in layers.items()}
    assert merges.finish() is not None
    for key, layer in layers.items():
        old, states = before[key]
        turn = old.double().T @ layer.projection.dense().double()
        after = opened(optimizer, layer.factor)
        assert len(after) == len(states) >= 1
        for (kind, was), (_, now) in zip(states, after, strict=True):
            rule = {"first": turn, "absolute": turn.abs()}.get(kind, turn.square())
            expected = was.double() if kind == "rows" else was.double() @ rule
            coarse = {"atol": float(0.02 * expected.abs().max()), "rtol": 0.07}  # an 8-bit state is coded again
            torch.testing.assert_close(
                now.double(), expected, **(coarse if "8 bits" in name else {"atol": 1e-6, "rtol": 1e-4})
            )
    assert step(model, optimizer, merges, 6) is None  # and trains on


@pytest.mark.parametrize("policy", ["transport", "reset"])
def test_states_without_a_rule_are_refused_or_forgotten(policy: str) -> None:
    settings = config("sketch", optimizer_state=policy)
    model, optimizer, merges = attached(torch.optim.Rprop, settings)
    before = bases(model)
    if policy == "transport":
        with pytest.raises(UserError, match=r"Rprop keeps 'prev' .*optimizer_state: reset"):
            step(model, optimizer, merges, 0)
        assert all(torch.equal(a, b) for a, b in zip(before, bases(model), strict=True))
        return
    assert step(model, optimizer, merges, 0) is not None
    assert all(layer.factor not in optimizer.state for _, layer in loqt_layers(model))  # it begins anew
    step(model, optimizer, merges, 1)
    sizes = [optimizer.state[layer.factor]["step_size"] for _, layer in loqt_layers(model)]
    assert all(float(size.min()) >= 5e-3 for size in sizes)  # lr 1e-2, halved at most
