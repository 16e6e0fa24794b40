"""The loop of `own_fsdp2.py` and `own_deepspeed.py` in one process, and how far losses on several ranks are from it."""

import torch
from own_loop import CONFIG, Model, batch, loss_of, text

from loqt_scale import attach, convert_to_loqt, muon
from loqt_scale.strategies import alone


def one_process(steps: int, seed: int) -> list[float]:
    """Losses of the same model on the same batches."""
    torch.manual_seed(seed)
    model = Model()
    before = model.state_dict()
    convert_to_loqt(model, CONFIG)
    optimizer = muon(model, lr=1e-2)
    editing = alone(torch.device("cpu"))  # torchrun started several: this model is nobody else's
    merges = attach(model, optimizer, CONFIG, initial_weights=before, editing=editing)
    (data, _), generator, losses = text(), torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        merges.prepare(backward_passes=1)
        loss = loss_of(model, batch(data, generator))
        loss.backward()
        optimizer.step()
        merges.finish()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def compare_with_one_process(losses: list[float], seed: int) -> None:
    """Prints a row: the largest differences in the first 40 steps and in all, means of the last 20 losses of both."""
    single = one_process(len(losses), seed)
    apart = [abs(ours - theirs) for ours, theirs in zip(losses, single, strict=True)]
    last, last_single = (sum(run[-20:]) / len(run[-20:]) for run in (losses, single))
    print(f"| seed {seed} | {max(apart[:40]):.1e} | {max(apart):.1e} | {last:.4f} | {last_single:.4f} |")
