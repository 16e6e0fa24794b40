"""Whatever ends a run saves it first, if its state is sound: that of the last whole step, on all ranks together.

one rank      any error, unless it came in the middle of an update or of a merge
many ranks    errors that all ranks raise together at the same step: data that a rank could not read, too many
              steps that were not finite, an evaluation that failed on one (where each rank has all weights). One rank
              alone cannot save, and the others wait for it in a collective
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch

from loqt_scale.errors import one_line
from loqt_scale.training.agreement import OutOfStepError
from loqt_scale.training.evaluation import EvaluationError
from loqt_scale.training.health import NonFiniteLossError
from loqt_scale.training.reading import UnreadableTogetherError

if TYPE_CHECKING:
    from loqt_scale.training.trainer import Trainer

TOGETHER = (NonFiniteLossError, UnreadableTogetherError, EvaluationError)  # raised on all ranks, at the same step


@contextmanager
def saved_first(trainer: Trainer) -> Iterator[None]:
    """Lets an error go on only when the run has been saved, or cannot be; says where the run goes on. Every rank."""
    try:
        yield
    except Exception as error:
        reason = _hindrance(trainer, error) or _try_to_save(trainer, error)
        with suppress(Exception):  # the one in the background counts too
            trainer.saver.wait()
        place = trainer.saver.way_on(trainer.done, reason)
        trainer.progress.line(f"ended by an error after step {trainer.done}; {place}")
        error.add_note(f"after step {trainer.done}; {place}")
        raise


def _hindrance(trainer: Trainer, error: Exception) -> str | None:
    """Why the state is not to be saved; None if it is."""
    if trainer.half_done is not None:
        return f"the error came in the middle of {trainer.half_done}"
    if isinstance(error, OutOfStepError):
        return "ranks disagree"
    if trainer.strategy.comm.world_size > 1 and not isinstance(error, TOGETHER):
        return "the other ranks were in the middle of a step"
    return None


def _try_to_save(trainer: Trainer, error: Exception) -> str | None:
    """Saves; why that failed, or None."""
    try:
        _let_go(trainer, error)
        with suppress(NonFiniteLossError):  # the step after the one too many
            trainer.finish_pending()
        if not _all_finite(trainer):
            return "there are weights that are not finite"
        if trainer.saver.saved != trainer.done:
            trainer.save(keep_all=True)
        trainer.saver.wait()
    except Exception as another:
        return f"saving failed too: {one_line(another)}"
    return None if trainer.saver.failure is None else str(trainer.saver.failure)


def _let_go(trainer: Trainer, error: Exception) -> None:
    """Frees what the unfinished step holds: there may be no memory left."""
    for each in (error, error.__cause__):
        if isinstance(each, torch.OutOfMemoryError):
            traceback.clear_frames(each.__traceback__)
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.strategy.step.after_forward_only(trainer.model)
    gc.collect()
    if trainer.strategy.comm.device.type == "cuda":
        torch.cuda.empty_cache()


def _all_finite(trainer: Trainer) -> bool:
    """Whether everything that trains is, on all ranks."""
    pieces = (trainer.strategy.placement.local(parameter.detach()) for parameter in trainer.parameters)
    mine = all(bool(torch.isfinite(piece).all()) for piece in pieces)
    return all(trainer.strategy.comm.side_channel().gather_objects(mine))
