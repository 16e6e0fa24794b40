"""The strategies of several ranks, on one: process groups, sharding and engines on the device, with one GPU at hand.

NCCL refuses two ranks on one GPU, so a rank is alone here. What several ranks add is tested on the CPU
(tests/distributed); what a device adds to each strategy (streams, its own communicator, a device's flat buffers) is
seen here.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from tests.cuda.conftest import Settings
from tests.cuda.test_training import EXACT_BASES, losses
from tests.distributed.pool import free_port

STEPS = 16  # merges after 0 and 13
STRATEGIES = {
    "ddp": {"parallel.strategy": "ddp"},
    "fsdp": {"parallel.strategy": "fsdp"},
    "zero-1": {"parallel.strategy": "zero", "parallel.zero_stage": 1},
    "zero-2": {"parallel.strategy": "zero", "parallel.zero_stage": 2},
    "zero-3": {"parallel.strategy": "zero", "parallel.zero_stage": 3},
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a launcher that has started one rank."""
    launcher = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for key, value in {**launcher, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(key, value)


@pytest.mark.parametrize("name", ["fsdp", "zero-2", "zero-3"])
def test_muon_too(settings: Settings, device: torch.device, launched: None, name: str) -> None:
    """Gram matrices summed by NCCL, rows of flat tensors; and as on the CPU."""
    check(settings, device, name, {**EXACT_BASES, "optim.name": "muon"}, 1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_one_rank_trains_as_a_single_process(
    settings: Settings, device: torch.device, launched: None, name: str, dtype: str
) -> None:
    bound = 1e-3 if dtype == "float32" else 3e-2
    check(settings, device, name, {**EXACT_BASES, "model.dtype": dtype}, bound)


def check(settings: Settings, device: torch.device, name: str, common: dict[str, object], bound: float) -> None:
    """Losses of a strategy's one rank are those of a single process, within a relative bound."""
    if name.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    expected = losses(settings(**common), device, STEPS)
    found = losses(settings(**common, **STRATEGIES[name]), device, STEPS)
    assert expected[-1] < expected[0] - 0.3, "the reference must have learnt something"
    assert found == pytest.approx(expected, rel=bound)
