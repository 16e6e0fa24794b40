"""Which GPU a rank takes; torch is told what it sees."""

from __future__ import annotations

import pytest
import torch

from loqt_scale.errors import UserError
from loqt_scale.strategies import resolve_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)

    return see


@pytest.mark.parametrize("shown", ["0", "5", "GPU-8a1b", " 3 "])
def test_a_rank_that_is_shown_one_gpu_takes_it_whatever_its_local_rank(gpus, shown: str) -> None:
    gpus(1)
    for local_rank in ("0", "3"):
        environment = {"LOCAL_RANK": local_rank, "CUDA_VISIBLE_DEVICES": shown}
        assert resolve_device("auto", environment) == torch.device("cuda", 0)


@pytest.mark.parametrize("shown", [None, "0,1,2,3"])
def test_else_the_local_rank_says_which(gpus, shown: str | None) -> None:
    gpus(4)
    environment = {} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}
    assert resolve_device("cuda", {**environment, "LOCAL_RANK": "3"}) == torch.device("cuda", 3)
    with pytest.raises(UserError, match="local rank 4 has no GPU of its own: 4 are visible"):
        resolve_device("cuda", {**environment, "LOCAL_RANK": "4"})


def test_a_machine_with_one_gpu_takes_one_rank(gpus) -> None:
    gpus(1)
    with pytest.raises(UserError, match="local rank 1 has no GPU of its own: 1 are visible"):
        resolve_device("cuda", {"LOCAL_RANK": "1"})
    gpus(0)
    assert resolve_device("auto", {}) == torch.device("cpu")
