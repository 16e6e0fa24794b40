"""Held-out loss: every held-out token counted once, over all ranks, whatever their number."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loqt_scale.data import Batch, Corpus
from loqt_scale.data.batching import counted_tokens, micro_batches
from loqt_scale.errors import one_line
from loqt_scale.functional.shares import micro_steps, share
from loqt_scale.strategies import Comm, Step


class EvaluationError(Exception):
    """A rank could not score its share of the held-out text. What has been trained is as it was."""


@torch.no_grad()
def evaluate(model: nn.Module, held_out: Batch, *, step: Step, micro_batch_size: int) -> float:
    """Token-weighted mean cross-entropy in nats on held-out sequences. Every rank; all get the same number.

    Args:
        model: The wrapped model, which ends in the loss; left in the mode it was in, otherwise unchanged.
        held_out: All held-out sequences (each rank scores its share).
        step: How the model is run, and who scores which sequences.
        micro_batch_size: Sequences per forward pass.

    Raises:
        EvaluationError: On all ranks, one of which has failed. (Where a forward pass takes all of them the others wait
            for it, and cannot be told: it raises what happened, as the only one.)
    """
    comm, alone = step.comm, step.forward_alone(model)
    total, failure, was_training = torch.zeros((), dtype=torch.float64, device=comm.device), None, model.training
    model.eval()
    try:
        total += _own_sum(alone or model, held_out, step, micro_batch_size)
    except Exception as error:
        if alone is None or comm.world_size == 1:
            raise
        failure = error
    step.after_forward_only(model)
    model.train(was_training)
    if comm.world_size > 1:
        _end_together(comm, failure)
    return float(step.sum(total)) / counted_tokens(held_out.labels)


def evaluate_corpus(
    model: nn.Module, corpus: Corpus, *, step: Step, micro_batch_size: int
) -> tuple[float, dict[str, float]]:
    """Held-out loss of all held-out tokens, and of each source's (`data.sources`; else none). Every rank.

    Raises:
        EvaluationError: As `evaluate`.
    """
    losses = {
        name: evaluate(model, held_out, step=step, micro_batch_size=micro_batch_size)
        for name, held_out in corpus.held_out.items()
    }
    if not losses:
        return evaluate(model, corpus.eval, step=step, micro_batch_size=micro_batch_size), {}
    tokens = {name: counted_tokens(held_out.labels) for name, held_out in corpus.held_out.items()}
    return sum(losses[name] * tokens[name] for name in losses) / sum(tokens.values()), losses


def _own_sum(model: nn.Module, held_out: Batch, step: Step, micro_batch_size: int) -> Tensor:
    """Sum of this rank's share of losses, () float64."""
    sequences = held_out.input_ids.shape[0]
    start, stop = share(sequences, step.data_rank, step.data_size)
    mine = Batch(held_out.input_ids[start:stop], held_out.labels[start:stop])
    steps = micro_steps(sequences, step.data_size, micro_batch_size)
    total = torch.zeros((), dtype=torch.float64, device=step.comm.device)
    for batch in micro_batches(mine, steps=steps, micro_batch_size=micro_batch_size, device=step.comm.device):
        with step.autocast():
            total += model(input_ids=batch.input_ids, targets=batch.labels)
    return total


def _end_together(comm: Comm, failure: Exception | None) -> None:
    """Raises EvaluationError if a rank has failed, with what its exception says. Every rank."""
    reasons = enumerate(comm.gather_objects(None if failure is None else one_line(failure)))
    if who := "; ".join(f"rank {rank}: {reason}" for rank, reason in reasons if reason is not None):
        raise EvaluationError(f"the held-out text cannot be scored: {who}") from failure
