"""Which checkpoint a run goes on from, and whether its settings allow that."""

from __future__ import annotations

from pathlib import Path

from loqt_scale.checkpoint.files import CheckpointError, damaged_files, refuse_damaged
from loqt_scale.checkpoint.folder import CHECKPOINTS, CONFIG, CheckpointFolder, locate_checkpoint
from loqt_scale.checkpoint.manifest import read_manifest
from loqt_scale.config import RunConfig
from loqt_scale.config_io import load_run_config
from loqt_scale.config_keys import ConfigError, flat_settings

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
    manifest = read_manifest(found)
    refuse_damaged(found, damaged_files(found, manifest.files, [CONFIG]))
    step = manifest.step
    _check_settings(found, config)
    if step > config.train.steps:
        raise CheckpointError(f"{found} is after step {step}, but train.steps is {config.train.steps}; write more")
    return found


def _check_settings(found: Path, config: RunConfig) -> None:
    try:
        old = flat_settings(load_run_config(found / CONFIG))
    except ConfigError as error:
        raise CheckpointError(f"{found / CONFIG} cannot be read: {error}") from None
    new = flat_settings(config)
    changed = [key for key in new if old[key] != new[key] and not key.startswith(FREE)]
    if changed:
        lines = "; ".join(f"{key} was {old[key]!r}, is {new[key]!r}" for key in changed)
        raise CheckpointError(
            f"settings have changed since {found}: {lines}. Write the old values to go on, or --checkpoint.resume "
            "never to start anew"
        )
