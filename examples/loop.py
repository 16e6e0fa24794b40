"""A loop of one's own, which the examples of images share. LoQT's lines are those under `if low_rank`."""

from collections.abc import Callable

import torch
from report import Curve, means
from torch import Tensor, nn

from loqt_scale import LoQTConfig, attach, convert_to_loqt


def fit(
    model: nn.Module,
    loss_of: Callable[[], Tensor],
    low_rank: LoQTConfig | None,
    *,
    steps: int,
    rate: float,
    seed: int,
    compensated: bool = True,
) -> tuple[torch.optim.Optimizer, Curve]:
    """Trains a model by AdamW; returns the optimizer and the training losses.

    Args:
        model: Trained in place.
        loss_of: One forward pass over a new batch.
        low_rank: LoQT's settings; None: full rank.
        steps: How many.
        rate: The highest learning rate of a cosine with warm-up.
        seed: Of LoQT's sketches.
        compensated: Whether the first merge makes up for what quantization rounds away.
    """
    if low_rank:
        before = {name: parameter.detach() for name, parameter in model.named_parameters()} if compensated else None
        print(convert_to_loqt(model, low_rank))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    if low_rank:
        merges = attach(model, optimizer, low_rank, total_steps=steps, seed=seed, initial_weights=before)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    losses: list[float] = []
    for _ in range(steps):
        if low_rank:
            merges.prepare()  # before the forward pass
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if low_rank:
            merges.finish()  # after the update, before gradients are zeroed
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return optimizer, means(losses)
