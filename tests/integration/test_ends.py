"""However a run of one rank ends, it is saved if its state is sound, and goes on to the unbroken run's losses."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loqt_scale.checkpoint import CheckpointError, CheckpointFolder, Manifest, saver, write
from loqt_scale.data.batches import StoredSequences
from loqt_scale.layers import loqt_layers
from loqt_scale.merge.one_layer import LayerMerge
from loqt_scale.model import loss as loss_module
from loqt_scale.training import trainer as trainer_module
from loqt_scale.training.health import NonFiniteLossError
from loqt_scale.training.job import train
from loqt_scale.training.reading import UnreadableDataError
from loqt_scale.training.stopping import Stopped
from loqt_scale.training.trainer import Trainer
from tests.distributed.footprint_tasks import make_trainer
from tests.distributed.tasks import small_config

STEPS = 8  # merges after steps 1, 5 (counted from 1), saves after 4 and 8
Once = Callable[[Any, str, int, BaseException], None]


@pytest.fixture
def settings(text_file: Path, cache_dir: Path, tmp_path: Path) -> dict[str, Any]:
    data = {"data.files": [str(text_file)], "data.cache_dir": str(cache_dir), "train.run_dir": str(tmp_path / "run")}
    loop = {"train.steps": STEPS, "loqt.merge.gap": 4, "loqt.merge.schedule": "constant", "checkpoint.every": 4}
    return {**data, **loop, "train.global_batch_size": 4, "train.micro_batch_size": 4, "optim.warmup_steps": 1}


@pytest.fixture(scope="module")
def known() -> list[list[float]]:
    return []


@pytest.fixture
def unbroken(settings: dict[str, Any], known: list[list[float]], tmp_path: Path) -> list[float]:
    if not known:
        train(small_config({**settings, "train.run_dir": str(tmp_path / "unbroken")}))
        known.append(losses(tmp_path / "unbroken"))
    return known[0]


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> Once:
    """Makes the n-th call (from 0) of a function raise, that one only."""

    def arm(owner: Any, name: str, call: int, error: BaseException) -> None:
        alive, calls = getattr(owner, name), iter(range(10**9))

        def deadly(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == call:
                raise error
            return alive(*args, **kwargs)

        monkeypatch.setattr(owner, name, deadly)

    return arm


def losses(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def latest(settings: dict[str, Any]) -> str:
    return (Path(settings["train.run_dir"]) / "checkpoints" / "latest").read_text().strip()


def names(settings: dict[str, Any]) -> list[str]:
    return sorted(path.name for path in (Path(settings["train.run_dir"]) / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("owner", "name", "call", "error", "raised"),
    [
        (StoredSequences, "sequences", 6, ConnectionError("the hub is away"), UnreadableDataError),
        (loss_module, "summed_loss", 8, torch.OutOfMemoryError("no memory left"), torch.OutOfMemoryError),
        (trainer_module, "evaluate_corpus", 1, RuntimeError("an evaluation that fails"), RuntimeError),
    ],
)
def test_an_error_between_two_updates_is_saved_first(
    settings: dict[str, Any],
    unbroken: list[float],
    once: Once,
    capsys: pytest.CaptureFixture[str],
    owner: Any,
    name: str,
    call: int,
    error: Exception,
    raised: type[Exception],
) -> None:
    config = small_config({**settings, "train.eval_every": 6})
    once(owner, name, call, error)
    with pytest.raises(raised, match=str(error)):
        train(config)
    step = int(latest(settings).removeprefix("step-"))
    assert step >= 6 and f"ended by an error after step {step}; it is saved" in capsys.readouterr().out
    train(config)
    assert f"resumed after step {step}" in capsys.readouterr().out
    assert losses(Path(settings["train.run_dir"])) == unbroken


def test_an_error_in_the_middle_of_a_merge_is_not_saved(
    settings: dict[str, Any], unbroken: list[float], once: Once, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the layers are merged: the way on is from the checkpoint before."""
    once(LayerMerge, "_carry_state", 20, RuntimeError("in the second merge"))
    config = small_config(settings)
    with pytest.raises(RuntimeError, match="in the second merge"):
        train(config)
    told = capsys.readouterr().out
    assert "it is not saved, the same command goes on from step 4 (the error came in the middle of a merge)" in told
    assert latest(settings) == "step-00000004"
    train(config)
    assert losses(Path(settings["train.run_dir"])) == unbroken


def test_too_many_steps_that_are_not_finite_are_saved_beside_what_there_is(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are those of the last good step; no older checkpoint is removed for them."""
    whole = loss_module.summed_loss
    calls = iter(range(100))
    monkeypatch.setattr(  # the first two calls are the evaluation's
        loss_module, "summed_loss", lambda *given: whole(*given) * (math.nan if next(calls) >= 7 else 1)
    )
    with pytest.raises(NonFiniteLossError):
        train(small_config({**settings, "optim.max_skipped_steps": 2, "checkpoint.keep_last": 1}))
    assert names(settings) == ["latest", "step-00000004", "step-00000008"], "the step after the last was on its way"


def test_a_loss_that_is_not_finite_is_not_applied_though_its_gradient_is(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device skips what the host counts as skipped; a merge step's merge follows the next step."""
    trainer, whole = make_trainer(small_config(settings)), loss_module.summed_loss
    updates = []
    for step, more in enumerate((math.inf, 0.0)):
        monkeypatch.setattr(loss_module, "summed_loss", lambda *given, more=more: whole(*given) + more)
        before = {name: tensor.clone() for name, tensor in trainer.built.model.state_dict().items()}
        trainer.step(step)
        trainer.finish_pending()
        same = [torch.equal(tensor, before[name]) for name, tensor in trainer.built.model.state_dict().items()]
        updates.append((trainer.updates, trainer.health.skipped, all(same)))
    assert updates == [(0, 1, True), (1, 1, False)]
    assert all(bool(layer.projection.dense().any()) for _, layer in loqt_layers(trainer.built.model))


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT, signal.SIGTERM]])
def test_told_to_stop_in_an_evaluation_on_the_way(
    settings: dict[str, Any], unbroken: list[float], monkeypatch: pytest.MonkeyPatch, numbers: list[int]
) -> None:
    config, whole = small_config({**settings, "train.eval_every": 2}), trainer_module.evaluate_corpus
    calls = iter(range(100))

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        for number in numbers if next(calls) == 1 else []:
            os.kill(os.getpid(), number)
        return whole(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        patch.setattr(trainer_module, "evaluate_corpus", evaluate)
        train(config)
    assert stopped.value.code == 128 + numbers[0] and latest(settings) == "step-00000004"
    train(config)
    assert losses(Path(settings["train.run_dir"])) == unbroken


@pytest.mark.parametrize(
    ("owner", "name", "call", "told"),
    [
        (trainer_module, "build_model", 0, "before training: nothing had to be saved"),
        (trainer_module, "evaluate_corpus", 0, "before training: nothing had to be saved"),
        (
            trainer_module,
            "evaluate_corpus",
            1,
            "after step 8, the last; it is saved, and the same command goes on from there",
        ),
    ],
)
def test_told_to_stop_where_nothing_is_to_be_saved(
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    owner: Any,
    name: str,
    call: int,
    told: str,
) -> None:
    whole, calls = getattr(owner, name), iter(range(100))

    def listen(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(*args, **kwargs)

    monkeypatch.setattr(owner, name, listen)
    with pytest.raises(Stopped) as stopped:
        train(small_config(settings))
    assert stopped.value.code == 130
    assert capsys.readouterr().err == f"stopped by SIGINT {told}\n"
    assert not names(settings)[1:] or latest(settings) == "step-00000008" if told.startswith("after") else True


def test_told_to_stop_while_a_checkpoint_is_being_written(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one in the background is finished, the one of the last step is written too."""
    whole = write.file_digest

    def slow(path: Path) -> str:
        if "step-00000004" in str(path):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pthread_sigmask(signal.SIG_BLOCK, [])
        return whole(path)

    monkeypatch.setattr(write, "file_digest", slow)
    monkeypatch.setattr("loqt_scale.training.stopping.BRUTAL", 10**9)
    with pytest.raises(Stopped):
        train(small_config(settings))
    assert "step-00000004" in names(settings) and int(latest(settings).removeprefix("step-")) > 4


def test_a_failed_save_is_tried_again_when_there_may_be_room(
    settings: dict[str, Any],
    unbroken: list[float],
    once: Once,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not only at the next regular time; what was half written does not keep the disk full."""
    monkeypatch.setattr(saver, "FIRST_PAUSE", 0.0)
    once(write, "file_digest", 3, OSError(28, "No space left on device"))
    train(small_config({**settings, "checkpoint.keep_last": 9, "checkpoint.background": False}))
    told = capsys.readouterr().out
    assert told.count("WARNING: checkpoint of step 4 not saved") == 1 and "checkpoints can be written again" in told
    assert names(settings)[1] in ("step-00000005", "step-00000006", "step-00000007"), (
        "between the regular ones, after 4 and 8"
    )
    assert losses(Path(settings["train.run_dir"])) == unbroken


def test_a_trained_model_that_cannot_be_saved_is_no_success(
    settings: dict[str, Any], unbroken: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=r"step 8 not saved.*Make room.*anew"):
        patch.setattr(write, "file_digest", full)
        train(small_config(settings))
    assert losses(Path(settings["train.run_dir"])) == unbroken
    assert names(settings) == [], "no .partial"


@pytest.mark.parametrize("failures", [1, 9], ids=["once", "for good"])
@pytest.mark.parametrize("end", ["told to stop", "an error"])
def test_the_last_step_is_saved_before_it_is_evaluated(
    settings: dict[str, Any],
    once: Once,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failures: int,
    end: str,
) -> None:
    """A failed save is tried again first; however the last evaluation ends, what is said of the way on is true."""
    whole, left = CheckpointFolder.publish, iter(range(failures))

    def full(folder: CheckpointFolder, step: int, manifest: Manifest) -> Path:
        if step == STEPS and next(left, None) is not None:
            raise OSError(28, "No space left on device")
        return whole(folder, step, manifest)

    monkeypatch.setattr(CheckpointFolder, "publish", full)
    once(
        trainer_module,
        "evaluate_corpus",
        1,
        Stopped(signal.SIGTERM) if end == "told to stop" else RuntimeError("no luck"),
    )
    with pytest.raises((Stopped, RuntimeError)) as raised:
        train(small_config(settings))
    told = capsys.readouterr().err + "".join(getattr(raised.value, "__notes__", ()))
    step, way = (
        (8, "it is saved, and the same") if failures == 1 else (4, "it is not saved, the same command goes on from")
    )
    assert f"after step 8{', the last' if end == 'told to stop' else ''}; {way}" in told
    assert latest(settings) == f"step-{step:08d}"


def test_the_way_on_is_from_what_is_published(settings: dict[str, Any], once: Once) -> None:
    """A save may fail after that, when another rank is killed."""
    whole = CheckpointFolder.point

    def cut_off(folder: CheckpointFolder, checkpoint: Path) -> None:
        whole(folder, checkpoint)
        raise ConnectionError("connection closed by peer")

    once(Trainer, "update", 5, RuntimeError("in an update"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="in an update") as raised:
        patch.setattr(CheckpointFolder, "point", cut_off)
        train(small_config(settings))
    assert latest(settings) == "step-00000004" and "goes on from step 4" in raised.value.__notes__[0]


def test_half_done_is_about_updates_and_merges_only(settings: dict[str, Any], once: Once) -> None:
    once(Trainer, "update", 5, RuntimeError("in an update"))
    with pytest.raises(RuntimeError, match="in an update") as raised:
        train(small_config(settings))
    assert "in the middle of an update" in raised.value.__notes__[0] and latest(settings) == "step-00000004"
