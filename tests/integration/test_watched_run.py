"""A run that is watched: FLOP/s, MFU, a profile, HParams, wandb; and the same run that is not, bit for bit."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from loqt_scale.config import ProfileConfig, RunConfig
from loqt_scale.config.yaml import parse_run_config
from loqt_scale.errors import ConfigError
from loqt_scale.metrics import check_wandb
from loqt_scale.metrics.wandb_run import ID_FILE, WandbRun
from loqt_scale.training.job import train
from loqt_scale.training.profiling import StepProfile

REGIONS = {"data", "forward", "backward", "optimizer", "merge"}


def configured(run_dir: Path, text_file: Path, cache_dir: Path, **changes: Any) -> RunConfig:
    given = {
        "model.preset": "llama_nano",
        "data.files": text_file,
        "data.cache_dir": cache_dir,
        "data.seq_len": 16,
        "data.max_eval_sequences": 4,
        "loqt.rank": 8,
        "train.run_dir": run_dir,
        "train.device": "cpu",
        "train.steps": 4,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 2,
        "checkpoint.every": 0,
        **changes,
    }
    return parse_run_config([f"--{key}={value}" for key, value in given.items()])


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


WATCHED = {"train.profile.start": 1, "train.profile.steps": 2, "train.peak_tflops": 0.5}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text_file: Path, cache_dir: Path) -> tuple[Path, Path]:
    plain, watched = (tmp_path_factory.mktemp(name) / "run" for name in ("plain", "watched"))
    train(configured(plain, text_file, cache_dir))
    train(configured(watched, text_file, cache_dir, **WATCHED))
    return plain, watched


def test_no_loss_changes_by_a_bit(runs: tuple[Path, Path]) -> None:
    plain, watched = (
        [(row["step"], row[key]) for row in rows(folder) for key in ("train/loss", "eval/loss") if key in row]
        for folder in runs
    )
    assert plain == watched and len(plain) == 6


def test_shares_of_the_peak_follow_from_tokens_and_flops(runs: tuple[Path, Path]) -> None:
    plain, watched = (rows(folder)[-2] for folder in runs)
    assert watched["perf/tokens_per_second_per_rank"] == watched["perf/tokens_per_second"]
    assert watched["perf/mfu"] == pytest.approx(watched["perf/tflops_per_rank"] / 0.5)
    assert watched["perf/hfu"] == watched["perf/mfu"]  # nothing is recomputed
    assert watched["perf/merge_seconds"] > 0.0 and "perf/mfu" not in plain
    per_token = [row["perf/tflops_per_rank"] / row["perf/tokens_per_second"] for row in (plain, watched)]
    assert per_token[0] == pytest.approx(per_token[1])


def test_a_trace_has_the_regions_of_the_steps_that_were_asked_for(runs: tuple[Path, Path]) -> None:
    assert not (runs[0] / "profile").exists()
    (path,) = (runs[1] / "profile").iterdir()
    assert path.name == "steps-1-2.rank-0.json.gz"
    with gzip.open(path, "rt") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
    counts = {region: names.count(region) for region in REGIONS}
    assert counts == {"data": 2, "forward": 4, "backward": 4, "optimizer": 2, "merge": 1}


def test_a_profile_is_named_by_the_steps_that_it_holds(tmp_path: Path) -> None:
    """A run that stopped inside its window and goes on there does not write over what it had."""
    window = ProfileConfig(start=2, steps=4)
    for steps in (range(3), range(3, 8)):
        profile = StepProfile(window, str(tmp_path), rank=0, device=torch.device("cpu"), tell=lambda line: None)
        for step in steps:
            profile.begin(step)
            if profile.ends_with(step):
                profile.close()
        profile.close()
    names = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert names == ["steps-2-3.rank-0.json.gz", "steps-4-5.rank-0.json.gz"]


def test_tensorboard_compares_runs_by_their_settings(runs: tuple[Path, Path]) -> None:
    board = EventAccumulator(str(runs[1] / "tensorboard"))
    board.Reload()
    found = board.summary_metadata
    begun = metadata.parse_session_start_info_plugin_data(found[metadata.SESSION_START_INFO_TAG].plugin_data.content)
    assert begun.hparams["loqt.rank"].number_value == 8 and begun.hparams["method"].string_value == "loqt"
    infos = metadata.parse_experiment_plugin_data(found[metadata.EXPERIMENT_TAG].plugin_data.content).metric_infos
    scalars = set(board.Tags()["scalars"])
    assert {info.name.tag for info in infos} <= scalars
    assert board.Scalars("eval/loss")[-1].value == pytest.approx(rows(runs[1])[-1]["eval/loss"])
    end = metadata.parse_session_end_info_plugin_data(found[metadata.SESSION_END_INFO_TAG].plugin_data.content)
    assert end.status == 1  # success


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.profile.steps=5", "--train.steps=12"], "records steps 10 to 14, but train.steps is 12"),
        (["--train.profile.start=0"], "train.profile.start is 0; write 1"),
        (["--train.profile.steps=-1"], "train.profile.steps is -1; write 0"),
        (["--train.peak_tflops=0"], "train.peak_tflops is 0.0; write a positive number"),
        (["--metrics.wandb_project="], "metrics.wandb_project is empty"),
    ],
)
def test_settings_that_cannot_work_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_run_config(words)


def test_wandb_that_is_not_installed_is_refused_though_its_folder_lies_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, "wandb", raising=False)
    settings = parse_run_config(["--metrics.wandb=true"]).metrics
    with pytest.raises(ConfigError, match="pip install 'loqt-scale\\[wandb\\]'"):
        check_wandb(settings)


def test_wandb_offline_keeps_its_id_and_ends_nothing(
    tmp_path: Path, text_file: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(configured(tmp_path / "run", text_file, cache_dir, **{"metrics.wandb": "true"}))
    longer = configured(tmp_path / "run", text_file, cache_dir, **{"metrics.wandb": "true", "train.steps": 5})
    train(longer)
    name = (tmp_path / "run" / ID_FILE).read_text().strip()
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(f"-{name}") for folder in folders)
    first, second = (next(folder.glob("*.wandb")).read_bytes() for folder in folders)
    for logged in (first, second):
        assert b"train/loss" in logged and b"loqt.rank" in logged

    def fails(*args: object, **kwargs: Mapping[str, object]) -> None:
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "init", fails)
    said: list[str] = []
    run = WandbRun(longer.metrics, tmp_path, {}, resumes=False, tell=said.append)
    run.log(1, {"train/loss": 1.0})
    run.close(succeeded=True)
    assert len(said) == 1 and "no network" in said[0] and "goes on" in said[0]
