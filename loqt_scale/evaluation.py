"""Held-out loss: every held-out token counted once, over all ranks, whatever their number."""

from __future__ import annotations

import torch
from torch import nn

from loqt_scale.batching import counted_tokens, micro_batches, micro_steps, share, summed_loss
from loqt_scale.data import Batch
from loqt_scale.strategies import Strategy


@torch.no_grad()
def evaluate(model: nn.Module, held_out: Batch, *, strategy: Strategy, micro_batch_size: int) -> float:
    """Token-weighted mean cross-entropy in nats on held-out sequences. Every rank; all get the same number.

    Args:
        model: The wrapped model; left in the mode it was in, otherwise unchanged.
        held_out: All held-out sequences (each rank scores its share).
        strategy: How the model is spread.
        micro_batch_size: Sequences per forward pass.
    """
    sequences = held_out.input_ids.shape[0]
    start, stop = share(sequences, strategy.rank, strategy.world_size)
    mine = Batch(held_out.input_ids[start:stop], held_out.labels[start:stop])
    steps = micro_steps(sequences, strategy.world_size, micro_batch_size)
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=strategy.device)
    for batch in micro_batches(mine, steps=steps, micro_batch_size=micro_batch_size, device=strategy.device):
        with strategy.autocast():
            logits = model(input_ids=batch.input_ids, use_cache=False).logits
        total += summed_loss(logits, batch.labels)
    strategy.after_forward_only(model)
    model.train(was_training)
    return float(strategy.sum(total)) / counted_tokens(held_out.labels)
