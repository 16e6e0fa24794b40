"""Fixtures of the tests of what a start finds in its run folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loqt_scale.config import RunConfig
from tests.distributed.tasks import small_config
from tests.integration.lines import STEPS, Killed, Runs


@pytest.fixture(scope="module")
def common(text_file: Path, cache_dir: Path) -> RunConfig:
    settings = {
        "data.files": [str(text_file)],
        "data.cache_dir": str(cache_dir),
        "data.max_eval_sequences": 2,
        "model.overrides": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
        "train.steps": STEPS,
        "train.global_batch_size": 2,
        "optim.warmup_steps": 1,
        "loqt.merge.gap": 3,
        "checkpoint.every": 1,
        "checkpoint.keep_last": 9,
    }
    return small_config(settings)


@pytest.fixture
def runs(common: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runs:
    return Runs(common, tmp_path, capsys)


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs something with a function that raises on its n-th call from there on."""

    def run(owner: Any, name: str, call: int, job: Callable[[], Any]) -> None:
        alive, calls = getattr(owner, name), 0

        def deadly(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= call:
                raise Killed
            return alive(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, deadly)
            with pytest.raises(Killed):
                job()

    return run
