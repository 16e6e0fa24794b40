"""A ViT of transformers on handwritten digits, in a loop of one's own (`loop.py`)."""

import torch
from compare import Result, compare, measured
from digits import digits
from loop import fit
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from loqt_scale import LoQTConfig, MergeConfig

CONFIG = LoQTConfig(rank=48, merge=MergeConfig(gap=30))
SHAPE = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
SPREAD = {"initializer_range": 0.1}  # transformers' 0.02 is for wider models: at this width losses stand still at first
IMAGE = {"image_size": 28, "patch_size": 7, "num_channels": 1, "num_labels": 10}


def train(method: str, seed: int, rate: float, short: bool) -> Result:
    torch.manual_seed(seed)
    images, labels, held_out, held_out_labels = digits()
    model = ViTForImageClassification(ViTConfig(**IMAGE, **SHAPE, **SPREAD))

    def loss_of() -> Tensor:
        rows = torch.randint(len(images), (64,))
        moved = torch.roll(images[rows], tuple(torch.randint(-2, 3, (2,)).tolist()), dims=(2, 3))
        return F.cross_entropy(model(pixel_values=moved).logits, labels[rows])

    low_rank = CONFIG if method == "loqt" else None
    optimizer, curve = fit(model, loss_of, low_rank, steps=5 if short else 600, rate=rate, seed=seed)
    return measured(accuracy(model, held_out, held_out_labels), curve, model, optimizer)


@torch.no_grad()
def accuracy(model: ViTForImageClassification, images: Tensor, labels: Tensor) -> float:
    """Per cent."""
    found = model.eval()(pixel_values=images).logits.argmax(-1)
    return 100 * (found == labels).float().mean().item()


if __name__ == "__main__":
    rates = {"loqt": [5e-3, 2.5e-3, 1e-2], "full": [2e-3, 1e-3, 4e-3, 8e-3]}
    compare(train, name="vit", score="held-out accuracy, %", curve="training loss", rates=rates)
