"""A loop of Accelerate's with merges: `attach` takes what `prepare` returns, and the losses are those without."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from loqt_scale import attach, convert_to_loqt
from tests.integration.trainer_cases import CONFIG, Progressions, has_trained, tiny_llama

STEPS = 7


@pytest.fixture(autouse=True)
def own_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(accelerator: Accelerator | None) -> tuple[nn.Module, list[float]]:
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    convert_to_loqt(model, CONFIG)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = torch.utils.data.DataLoader(Progressions(), batch_size=4)
    if accelerator is not None:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    merges, batches, found = (
        attach(model, optimizer, CONFIG, total_steps=STEPS, initial_weights=before),
        iter(loader),
        [],
    )
    for _ in range(STEPS):
        merges.prepare()
        loss = model(**next(batches)).loss
        loss.backward() if accelerator is None else accelerator.backward(loss)
        optimizer.step()
        merges.finish()
        optimizer.zero_grad()
        found.append(loss.item())
    return model, found


def test_a_loop_of_accelerates_is_the_loop_without() -> None:
    model, found = train(Accelerator(cpu=True))
    assert has_trained(model)
    assert found == train(None)[1]
