"""TrainingArguments(enable_jit_checkpoint=True): a checkpoint on SIGTERM, wherever it comes, goes on to the bit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from tests.integration.trainer_cases import losses, make_trainer, state_of, tiny_llama


class Killed(TrainerCallback):
    """Sends SIGTERM at an event of a step, and waits until Trainer's callback has taken note of it."""

    def __init__(self, event: str, step: int) -> None:
        self.trainer: Any = None
        self._step, self._sent = step, False
        setattr(self, event, self._kill)

    def in_forward(self, *_: object) -> None:
        self._kill(None, self.trainer.state, None)

    def _kill(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step and not self._sent:
            self._sent = True
            os.kill(os.getpid(), signal.SIGTERM)
            manager = manager_of(self.trainer)
            until = time.monotonic() + 10.0
            while not manager.is_checkpoint_requested and time.monotonic() < until:
                time.sleep(0.01)


def manager_of(trainer: Trainer) -> Any:
    """Trainer's manager of signals."""
    callbacks = trainer.callback_handler.callbacks
    return next(each for each in callbacks if isinstance(each, JITCheckpointCallback)).jit_manager


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, Tensor]]:
    trainer = make_trainer(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return losses(trainer), state_of(trainer.model)


@pytest.fixture(autouse=True)
def own_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("event", "step", "saved"),
    [
        ("forward", 3, 3),  # in the middle of an accumulation: two passes a step
        ("forward", 5, 5),  # of a step that ends in a merge: its sketches are collected, and not merged
        ("on_optimizer_step", 5, 6),  # after the update, around the merge
        ("on_step_end", 4, 5),  # between steps; it is seen when the next one, which merges, has begun
    ],
)
def test_a_checkpoint_on_a_signal_goes_on_to_the_last_bit(
    whole: tuple[list[float], dict[str, Tensor]], event: str, step: int, saved: int, tmp_path: Path
) -> None:
    killed = Killed(event, step + (event == "on_step_end"))
    trainer = make_trainer(tmp_path, enable_jit_checkpoint=True)
    trainer.add_callback(killed)
    killed.trainer, manager_of(trainer).kill_wait = trainer, 0
    if event == "forward":
        trainer.model.register_forward_pre_hook(killed.in_forward)
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{saved}"]
    assert trainer.state.global_step < len(whole[0])
    again = make_trainer(tmp_path / "again", model=tiny_llama(seed=7))
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved}"))
    assert losses(again)[-(len(whole[0]) - saved) :] == whole[0][saved:]
    assert all(torch.equal(tensor, whole[1][name]) for name, tensor in state_of(again.model).items())
