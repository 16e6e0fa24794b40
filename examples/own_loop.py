"""A loop of one's own: a small language model on the text of Python's manual, LoQT against full rank.

python examples/own_loop.py [--short] [--sweep]

Both by Muon (`loqt_scale.muon`: momentum 0.9 for the matrices, AdamW for the rest) and by AdamW alone.
"""

from copy import deepcopy
from pydoc_data.topics import topics
from statistics import mean

import torch
from compare import Result, compare, means, measured
from torch import Tensor, nn
from torch.nn import functional as F

from loqt_scale import LoQTConfig, MergeConfig, attach, convert_to_loqt, muon

CONFIG = LoQTConfig(rank=32, merge=MergeConfig(gap=40))
LENGTH, WIDTH, SEQUENCES = 64, 128, 16


class Model(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


class Block(nn.Module):
    """Attention and two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


def text() -> tuple[Tensor, Tensor]:
    """(training, held-out) bytes, some 700 kB, the last tenth held out."""
    data = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))
    return data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]


def batch(data: Tensor, generator: torch.Generator) -> Tensor:
    starts = torch.randint(0, len(data) - LENGTH - 1, (SEQUENCES,), generator=generator)
    return torch.stack([data[start : start + LENGTH + 1] for start in starts])


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(method: str, seed: int, rate: float, short: bool, editing=None) -> Result:
    torch.manual_seed(seed)
    (training, held_out), model, generator, losses = text(), Model(), torch.Generator().manual_seed(seed), []
    low_rank, before = method.startswith("loqt"), model.state_dict()
    matrices = convert_to_loqt(model if low_rank else deepcopy(model), CONFIG)  # their names
    if method.endswith("AdamW"):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    else:
        optimizer = muon(model, lr=rate, dense_layers=[] if low_rank else matrices)
    if low_rank:
        merges = attach(model, optimizer, CONFIG, initial_weights=before, seed=seed, editing=editing)
    for _ in range(4 if short else 400):
        if low_rank:
            merges.prepare()
        loss = loss_of(model, batch(training, generator))
        loss.backward()
        optimizer.step()
        if low_rank:
            merges.finish()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        fixed = torch.Generator().manual_seed(0)
        score = mean(loss_of(model, batch(held_out, fixed)).item() for _ in range(10))
    return measured(score, means(losses), model, optimizer)


if __name__ == "__main__":
    rates = {"loqt, Muon": [4e-2, 5e-3, 1e-2, 2e-2, 8e-2], "full, Muon": [1e-2, 5e-3, 2e-2]}
    rates |= {"loqt, AdamW": [1.6e-2, 2e-3, 4e-3, 8e-3, 3.2e-2], "full, AdamW": [4e-3, 1e-3, 2e-3, 8e-3, 1.6e-2]}
    compare(train, name="own_loop", score="held-out loss, nats a byte", curve="training loss", rates=rates)
