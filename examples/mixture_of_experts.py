"""A small Mixtral of transformers on the text of Python's standard library, byte by byte, in a loop (`loop.py`)."""

import argparse
import sysconfig
from pathlib import Path

import torch
from compare import Result, compare, measured
from loop import fit
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from loqt_scale import LoQTConfig, MergeConfig

CONFIG = LoQTConfig(rank=32, merge=MergeConfig(gap=30))
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
TOKENS, ROWS = 64, 16


def text(package: str) -> Tensor:
    """The files of a package, (bytes,) int64."""
    files = sorted((Path(sysconfig.get_path("stdlib")) / package).rglob("*.py"))
    return torch.tensor(list(b"".join(file.read_bytes() for file in files)), dtype=torch.int64)


def batch(of: Tensor) -> Tensor:
    starts = torch.randint(len(of) - TOKENS, (ROWS, 1))
    return of[starts + torch.arange(TOKENS)]


def train(method: str, seed: int, rate: float, short: bool) -> Result:
    torch.manual_seed(seed)
    trained, held_out = text("asyncio"), text("concurrent")
    spread = {"initializer_range": OPTIONS.spread}
    model = MixtralForCausalLM(
        MixtralConfig(vocab_size=256, max_position_embeddings=TOKENS, **SHAPE, **EXPERTS, **spread)
    )

    def loss_of() -> Tensor:
        rows = batch(trained)
        return model(input_ids=rows, labels=rows).loss

    low_rank = CONFIG if method == "loqt" else None
    optimizer, curve = fit(model, loss_of, low_rank, steps=5 if short else 300, rate=rate, seed=seed)
    return measured(held_out_loss(model, held_out), curve, model, optimizer)


@torch.no_grad()
def held_out_loss(model: MixtralForCausalLM, held_out: Tensor) -> float:
    """Nats a byte."""
    rows = held_out[: len(held_out) // TOKENS * TOKENS].view(-1, TOKENS)[:256]
    return model.eval()(input_ids=rows, labels=rows).loss.item()


parser = argparse.ArgumentParser(add_help=False)
parser.add_argument("--spread", type=float, default=0.05, help="of the initial weights; transformers has 0.02")
OPTIONS, _ = parser.parse_known_args()
if __name__ == "__main__":
    rates = {"loqt": [2e-2, 1e-2, 4e-2], "full": [4e-3, 2e-3, 8e-3, 1.6e-2]}
    name = "mixture_of_experts"
    compare(train, name=name, score="held-out loss, nats a byte", curve="training loss", rates=rates)
