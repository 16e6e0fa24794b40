"""What a path to a model means, and the settings with which it is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from loqt_scale.checkpoint import CheckpointError
from loqt_scale.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from loqt_scale.config.keys import flat_settings
from loqt_scale.inference.saved_model import find_saved, self_contained


def test_a_path_is_a_checkpoint_a_run_or_a_folder_of_hugging_faces(tmp_path: Path) -> None:
    run = tmp_path / "run"
    steps = [run / "checkpoints" / f"step-{step:08}" for step in (3, 12)]
    for step in steps:
        step.mkdir(parents=True)
        (step / "manifest.json").write_text("{}")
    (run / "checkpoints" / "latest").write_text("step-00000012\n")
    assert find_saved(run) == find_saved(steps[1]) == steps[1] and find_saved(steps[0]) == steps[0]
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_saved(folder)
    (folder / "config.json").write_text("{}")
    assert find_saved(folder) is None
    with pytest.raises(CheckpointError, match="is no folder"):
        find_saved(tmp_path / "absent")


@pytest.mark.parametrize(("tokenizer", "expected"), [("bytes", "bytes"), ("bpe", "files"), ("/gone/folder", "files")])
def test_model_and_tokenizer_come_from_the_files_and_placement_is_the_users(tokenizer: str, expected: str) -> None:
    config = RunConfig(
        model=ModelConfig(overrides={"num_hidden_layers": 3}),
        data=DataConfig(tokenizer=tokenizer, seq_len=64),
        parallel=ParallelConfig(strategy="zero", zero_stage=2, timeout_seconds=99),
        train=TrainConfig(steps=77),
    )
    before, after = flat_settings(config), flat_settings(self_contained(config, Path("files")))
    changed = {key: value for key, value in after.items() if value != before[key]}
    given = {"model.path": "files", "model.overrides": {}, "parallel.strategy": "auto", "parallel.zero_stage": None}
    assert changed == given | ({} if expected == tokenizer else {"data.tokenizer": expected})
