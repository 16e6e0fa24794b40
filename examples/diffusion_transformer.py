"""Image generation: a small diffusion transformer, by flow matching, on handwritten digits.

The model sees x_t = (1 - t) noise + t image and a label, and predicts the velocity image - noise. Sampling follows the
velocity from noise in 20 steps. Prints the held-out loss, writes two rows of samples.
"""

import matplotlib.pyplot as pyplot
import torch
from compare import Result, compare, folder_of, measured
from digits import digits
from loop import fit
from torch import Tensor, nn
from torch.nn import functional as F

from loqt_scale import LoQTConfig, MergeConfig

NAME = "diffusion_transformer"
WIDTH, PATCH, DEPTH = 64, 4, 3
CONFIG = LoQTConfig(rank=48, merge=MergeConfig(gap=40), exclude_modules=["embed", "out"])


class Block(nn.Module):
    """Attention and MLP, shifted and scaled by what is known of time and label (adaLN-Zero)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.condition = nn.Linear(WIDTH, 6 * WIDTH)
        nn.init.zeros_(self.condition.weight), nn.init.zeros_(self.condition.bias)

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = self.condition(F.silu(known)).unsqueeze(1).chunk(6, -1)
        h = F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(h).chunk(3, -1))
        x = x + gate * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = F.layer_norm(x, (WIDTH,)) * (1 + scale_2) + shift_2
        return x + gate_2 * self.down(F.gelu(self.up(h)))


class DiffusionTransformer(nn.Module):
    """Velocity (N, 1, 28, 28) of noised images at times (N,) under labels (N,)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(PATCH**2, WIDTH), nn.Linear(WIDTH, PATCH**2)
        self.place, self.label = nn.Embedding((28 // PATCH) ** 2, WIDTH), nn.Embedding(10, WIDTH)
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        waves = t[:, None] * torch.logspace(0, 3, WIDTH // 2)
        known = self.time(torch.cat([waves.sin(), waves.cos()], 1)) + self.label(label)
        h = self.embed(F.unfold(x, PATCH, stride=PATCH).transpose(1, 2)) + self.place.weight
        for block in self.blocks:
            h = block(h, known)
        return F.fold(self.out(F.layer_norm(h, (WIDTH,))).transpose(1, 2), 28, PATCH, stride=PATCH)


def flow_loss(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    noise = torch.randn(images.shape, generator=generator)
    t = torch.rand(len(images), generator=generator)
    mixed = t.view(-1, 1, 1, 1) * images + (1 - t.view(-1, 1, 1, 1)) * noise
    return F.mse_loss(model(mixed, t, labels), images - noise)


@torch.no_grad()
def sample(model: nn.Module, steps: int = 20) -> Tensor:
    """Two rows of the ten digits, (56, 280)."""
    x, labels = torch.randn(20, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 10
    for step in range(steps):
        x = x + model(x, torch.full((20,), step / steps), labels) / steps
    return x.clamp(-1, 1).view(2, 10, 28, 28).transpose(1, 2).reshape(56, 280)


def train(method: str, seed: int, rate: float, short: bool) -> Result:
    torch.manual_seed(seed)
    images, labels, held_out, held_out_labels = digits()
    model = DiffusionTransformer()

    def loss_of() -> Tensor:
        rows = torch.randint(len(images), (32,))
        return flow_loss(model, images[rows], labels[rows])

    low_rank = CONFIG if method == "loqt" else None
    optimizer, curve = fit(model, loss_of, low_rank, steps=4 if short else 400, rate=rate, seed=seed)
    with torch.no_grad():
        score = flow_loss(model, held_out, held_out_labels, torch.Generator().manual_seed(0)).item()
    pyplot.imsave(folder_of(NAME) / f"{method}-{rate:g}-{seed}.png", sample(model), cmap="gray")
    return measured(score, curve, model, optimizer)


if __name__ == "__main__":
    rates = {"loqt": [4e-2, 1e-2, 2e-2, 8e-2], "full": [3.2e-2, 4e-3, 8e-3, 1.6e-2, 6.4e-2]}
    compare(train, name=NAME, score="held-out loss", curve="training loss", rates=rates)
