"""A run over a streamed data set that is killed, and one that goes on from any step: the losses of the unbroken one."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import RankPool
from tests.distributed.runs import TRAIN
from tests.distributed.tasks import SMALL_RUN
from tests.distributed.test_faults import KILLED, finish, start
from tests.distributed.test_launchers import losses

FILES, STEPS = 12, 8


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run that is in its second epoch at the end."""
    folder = tmp_path_factory.mktemp("streams")
    words = ["low", "rank", "base", "factor", "merge", "sketch", "probe", "moment"]
    for number in range(FILES):
        rows = [" ".join(words[(number + row * k) % 8] for k in range(5, 30)) for row in range(3 + number)]
        (folder / f"train-{number:02d}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (folder / "validation.jsonl").write_text("".join(json.dumps({"text": word * 9}) + "\n" for word in words))
    return {
        "data.dataset": str(folder),
        "data.seq_len": 32,
        "data.max_eval_sequences": 2,
        "model.preset": "llama_nano",
        "loqt.rank": 8,
        "loqt.merge.gap": 3,
        "loqt.merge.schedule": "constant",
        "optim.lr": 5e-3,
        "train.global_batch_size": FILES,
        "train.steps": STEPS,
        "train.progress": "off",
        "checkpoint.every": 1,
        "checkpoint.keep_last": 9,
    }


@pytest.mark.long  # a process of its own, and five runs; the same of tokens alone is in tests/unit/data
@pytest.mark.timeout(600)
def test_killed_and_resumed_at_any_step(ranks: RankPool, common: dict[str, Any], tmp_path: Path) -> None:
    def run(world_size: int, name: str, **more: Any) -> dict[int, float]:
        strategy = "ddp" if world_size > 1 else "single"
        given = {**common, "parallel.strategy": strategy, "train.run_dir": str(tmp_path / name), **more}
        rows = ranks.run(world_size, TRAIN, **given)[0]
        return {int(row["step"]): row["train/loss"] for row in rows if "train/loss" in row}

    unbroken = run(1, "unbroken")
    killed = {**SMALL_RUN, **common, "train.run_dir": str(tmp_path / "killed"), "parallel.strategy": "single"}
    words = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in killed.items()]
    status, output = finish(start([sys.executable, KILLED, "step", "6", str(tmp_path / "marker"), *words]))
    assert status == -signal.SIGKILL, output
    assert len(losses(tmp_path / "killed")) < STEPS
    assert run(1, "killed") == unbroken
    for step, world_size in ((2, 3), (5, 2), (7, 4)):
        checkpoint = tmp_path / "unbroken" / "checkpoints" / f"step-{step:08d}"
        rest = run(world_size, f"from-{step}", **{"checkpoint.resume": str(checkpoint)})
        assert rest == pytest.approx({at: loss for at, loss in unbroken.items() if at > step}, abs=2e-4), step
