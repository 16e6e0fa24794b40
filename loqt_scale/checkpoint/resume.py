"""Which checkpoint a run goes on from, and whether its settings allow that."""

from __future__ import annotations

from pathlib import Path

from loqt_scale.checkpoint.files import CheckpointError
from loqt_scale.checkpoint.folder import CHECKPOINTS, CheckpointFolder, locate_checkpoint
from loqt_scale.checkpoint.manifest import read_manifest
from loqt_scale.checkpoint.opened import Checkpoint
from loqt_scale.config import RunConfig
from loqt_scale.config_keys import flat_settings

# settings that may change between a checkpoint and what goes on from it: they do not change the numbers
FREE = (
    "checkpoint.",
    "parallel.",
    "model.compile",
    "model.activation_checkpointing",
    "data.cache_dir",
    "train.run_dir",
    "train.on_existing_run",
    "train.device",
    "train.micro_batch_size",
    "train.eval_every",
    "train.log_every",
    "train.progress",
    "train.wire_counter",
)


def find_resume(config: RunConfig) -> Path | None:
    """The checkpoint that a run goes on from; None if it starts anew. Reads manifests and settings, no tensors.

    Args:
        config: The run. Under `auto` a finished run in its folder does not count.

    Raises:
        CheckpointError: There is one, and it cannot be used; or settings have changed since (named, old and new).
    """
    wanted = config.checkpoint.resume
    if wanted == "never":
        return None
    if wanted == "auto":
        found = CheckpointFolder(Path(config.train.run_dir) / CHECKPOINTS).latest()
        if found is None or read_manifest(found).step >= config.train.steps:
            return None
    else:
        found = Path(wanted)
        if not found.is_dir():
            raise CheckpointError(
                f"checkpoint.resume is '{wanted}', which is no folder; write auto, never or a checkpoint's folder, "
                f"e.g. RUN_DIR/{CHECKPOINTS}/step-00001000"
            )
        found = locate_checkpoint(found)
    checkpoint = Checkpoint(found)
    step = checkpoint.manifest.step
    _check_settings(checkpoint, config)
    if step > config.train.steps:
        raise CheckpointError(f"{found} is after step {step}, but train.steps is {config.train.steps}; write more")
    return found


def _check_settings(checkpoint: Checkpoint, config: RunConfig) -> None:
    old, new = flat_settings(checkpoint.settings()), flat_settings(config)
    changed = [key for key in new if old[key] != new[key] and not key.startswith(FREE)]
    if changed:
        lines = "; ".join(f"{key} was {old[key]!r}, is {new[key]!r}" for key in changed)
        raise CheckpointError(
            f"settings have changed since {checkpoint.path}: {lines}. Write the old values to go on, or "
            "--checkpoint.resume never to start anew"
        )
