"""What a run that is made longer does from a checkpoint on, against one that had that length from its beginning."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from loqt_scale.checkpoint.files import CheckpointError
from loqt_scale.checkpoint.folder import CONFIG
from loqt_scale.checkpoint.manifest import Manifest, read_manifest
from loqt_scale.checkpoint.opened import read_settings
from loqt_scale.config import RunConfig
from loqt_scale.errors import ConfigError
from loqt_scale.functional.merge_steps import planned_merges
from loqt_scale.optim import LearningRates


def begins_decay(checkpoint: Path) -> bool:
    """Whether the run that saved it begins its decay there (`optim.schedule: wsd`): a longer one branches off there.

    It is kept for good, also when the run has been made longer from its end and begins its decay elsewhere by now.
    """
    with suppress(CheckpointError, ConfigError, OSError):
        config, manifest = read_settings(checkpoint / CONFIG), read_manifest(checkpoint)
        rates = LearningRates.of_run(config.optim, config.train.steps, warmup_steps=manifest.warmup_steps)
        return rates.branching_step == manifest.step
    return False


def describe_growth(manifest: Manifest, config: RunConfig, before: int) -> str:
    """For people: whether it is the same run, else how its rates jump and which merges it goes without.

    Args:
        manifest: The checkpoint's.
        config: The run that goes on; its own schedule moves the learning rates, not DeepSpeed's.
        before: `train.steps` when the checkpoint was saved.
    """
    steps, done = config.train.steps, manifest.step
    began = config.optim.warmup_of(before) if manifest.warmup_steps is None else manifest.warmup_steps
    old = LearningRates.of_run(config.optim, before, warmup_steps=began)
    new = LearningRates.of_run(config.optim, steps, warmup_steps=manifest.warmup_steps)
    longer = LearningRates.of_run(config.optim, steps)
    left_out = _merges_left_out(config, before, done)
    if old.agrees(longer, done) and new == longer and not left_out:
        return "as they were from its first step"
    told = [] if old.agrees(new, done) else [_jump(old, new, done)]
    if began != longer.warmup_steps:
        told.append(f"the warm-up was {began} steps, not {longer.warmup_steps}")
    if left_out:
        told.append(f"{left_out} merge(s) of before, which loqt.merge.last_step_fraction had left out, do not follow")
    return "but " + "; ".join(told)


def _jump(old: LearningRates, new: LearningRates, done: int) -> str:
    jump = f"the rate goes from {old.factor(max(0, done - 1)):.3g} to {new.factor(done):.3g} of its peak"
    if old.branching_step is None:
        return jump
    return (
        f"{jump}, since the decay had begun; without that a checkpoint of step {old.branching_step} or before goes on "
        "with checkpoint.resume: PATH"
    )


def _merges_left_out(config: RunConfig, before: int, done: int) -> int:
    """Merges that fall on steps done if the run is longer, and did not fall there."""
    if config.method != "loqt":
        return 0
    short, long = (planned_merges(config.loqt.merge, length, done=done) for length in (before, config.train.steps))
    return len(long) - len(short)
