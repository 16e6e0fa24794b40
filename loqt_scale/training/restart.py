"""What a checkpoint holds of a run besides tensors, and a trainer put back where one was saved.

trainer -> manifest      counters: steps, updates, tokens, ...                                `manifest_of`
trainer -> side files    settings, place in the text, the model's and the tokenizer's files   `side_files_of`
checkpoint -> trainer    tensors, moments, counters, learning rates, merges that are due      `restore`
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from loqt_scale.checkpoint import CONFIG, DATA, FORMAT, HUGGINGFACE, Checkpoint, Manifest, load_checkpoint
from loqt_scale.config.yaml import save_run_config
from loqt_scale.data import join_positions
from loqt_scale.merge import MergeCoordinator
from loqt_scale.model.architectures import portable_config
from loqt_scale.optim import LearningRates, set_schedule_position, set_update_count

if TYPE_CHECKING:
    from loqt_scale.training.trainer import Trainer


def manifest_of(trainer: Trainer) -> Manifest:
    """What a checkpoint of now says about itself; its tensors and files are filled in when they are written."""
    assert trainer.eval_before is not None
    return Manifest(
        format=FORMAT,
        step=trainer.done,
        updates=trainer.updates,
        skipped_in_a_row=trainer.health.in_a_row,
        merge_is_due=trainer.merges is not None and trainer.merges.is_merge_step(trainer.done),
        tokens=trainer.tokens,
        warmup_steps=trainer.learning_rates.warmup_steps,
        eval_before=trainer.eval_before,
        world_size=trainer.strategy.comm.world_size,
        strategy=trainer.strategy.description,
        tensors={},
    )


def side_files_of(trainer: Trainer) -> Callable[[Path], None]:
    """Writes a checkpoint's other files into the folder it gets, perhaps in the background. Every rank.

    The place in the text is that of this call: they are written while training reads on.
    """
    position = trainer.corpus.train.position(trainer.done)
    if trainer.corpus.streams:
        position = join_positions(trainer.strategy.comm.gather_objects(position))

    def write(folder: Path) -> None:
        save_run_config(trainer.config, folder / CONFIG)
        if position is not None:
            (folder / DATA).write_text(json.dumps(position) + "\n", encoding="utf-8")
        tokenizer = trainer.corpus.tokenizer
        portable = portable_config(trainer.built.hf_config, eos_token_id=tokenizer.eos_token_id)
        portable.save_pretrained(folder / HUGGINGFACE)
        tokenizer.save(folder / HUGGINGFACE)

    return write


def restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Goes back to where a (verified) checkpoint was saved; its text stands there (`seek_text`). Every rank.

    Raises:
        CheckpointError: It is of another model, holds a number that is not finite, or has changed meanwhile.
    """
    manifest = checkpoint.manifest
    load_checkpoint(checkpoint, trainer.built.model, trainer.optimizer, trainer.strategy.editing)
    set_update_count(trainer.optimizer, manifest.updates)
    _keep_warmup(trainer, manifest.warmup_steps)
    set_schedule_position(trainer.scheduler, manifest.step)
    trainer.done, trainer.tokens, trainer.eval_before = manifest.step, manifest.tokens, manifest.eval_before
    trainer.updates, trainer.health.skipped = manifest.updates, manifest.step - manifest.updates
    trainer.health.in_a_row, trainer.saver.saved = manifest.skipped_in_a_row, manifest.step
    if trainer.merges is not None:
        _expect_merges(trainer.merges, manifest)
    trainer.progress.line(
        f"resumed after step {trainer.done} from {checkpoint.path} (saved by {manifest.world_size} ranks)"
    )


def _expect_merges(merges: MergeCoordinator, manifest: Manifest) -> None:
    merges.go_on(manifest.step)
    if manifest.merge_is_due:
        merges.require(manifest.step)
    if manifest.updates == 0:  # the first update is followed by the first merge
        merges.expect_first_merge()


def _keep_warmup(trainer: Trainer, steps: int | None) -> None:
    """The warm-up of a run that goes on is the one with which it began, however long the run is by now."""
    train, optim = trainer.config.train, trainer.config.optim
    if steps not in (None, trainer.learning_rates.warmup_steps):
        trainer.progress.line(f"the warm-up stays as the run began: {steps} step{'' if steps == 1 else 's'}")
    trainer.learning_rates = LearningRates.of_run(optim, train.steps, warmup_steps=steps)
