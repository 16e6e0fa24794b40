"""A small model with linears of every kind, and merges over it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loqt_scale import LoQTConfig, MergeConfig, MergeCoordinator, SubspaceConfig, attach, convert_to_loqt
from loqt_scale.config import SubspaceMethod
from loqt_scale.layers import loqt_layers

RANK, SCALE = 8, 0.5


class Small(nn.Module):
    """Linears of every kind: square, wide, tall, with and without bias, and one that stays in full precision."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 48)
        self.square = nn.Linear(48, 48, bias=False)
        self.up = nn.Linear(48, 86)
        self.down = nn.Linear(86, 48)
        self.lm_head = nn.Linear(48, 50, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = hidden + self.square(hidden)
        hidden = hidden + self.down(torch.tanh(self.up(hidden)))
        return self.lm_head(hidden)


class Dense:
    """The weights before conversion."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.weights[name][start:stop].clone()  # the caller's own


def config(method: SubspaceMethod = "svd", **merge: object) -> LoQTConfig:
    return LoQTConfig(
        rank=RANK,
        scale=SCALE,
        subspace=SubspaceConfig(method=method),
        merge=MergeConfig(gap=5, schedule="constant", **merge),  # type: ignore[arg-type]
    )


SKETCH = config("sketch")


def attached(
    kind: Any = torch.optim.AdamW, settings: LoQTConfig = SKETCH, **how: Any
) -> tuple[Small, torch.optim.Optimizer, MergeCoordinator]:
    """A converted model, its optimizer (`kind`, with `how`) and its merges, as `attach` gives them."""
    torch.manual_seed(0)
    model = Small()
    convert_to_loqt(model, settings)
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-2, **how)
    return model, optimizer, attach(model, optimizer, settings)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def bases(model: nn.Module) -> list[Tensor]:
    return [layer.projection.dense() for _, layer in loqt_layers(model)]


def make(settings: LoQTConfig, *, true_weights: bool = True) -> tuple[Small, MergeCoordinator, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Small()
    source = Dense(model) if true_weights else None
    convert_to_loqt(model, settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    merges = MergeCoordinator(model, optimizer, settings, total_steps=100, seed=3, initial_weights=source)
    return model, merges, optimizer


def batch(step: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 50, (4, 17), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], (tokens[:, :-1] * 7 + 3) % 50  # a rule that can be learnt


def loss_of(model: nn.Module, step: int) -> Tensor:
    inputs, targets = batch(step)
    return nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def step(model: nn.Module, optimizer: torch.optim.Optimizer, merges: MergeCoordinator, data: int) -> Any:
    """A step of a plain loop, which leaves its number to the merges."""
    merges.prepare()
    loss_of(model, data).backward()
    optimizer.step()
    report = merges.finish()
    optimizer.zero_grad()
    return report


def train(model: nn.Module, merges: MergeCoordinator, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        merges.prepare(step)
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        merges.finish(step)
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses
