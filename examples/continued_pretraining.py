"""Continued pretraining of a pretrained folder on a text file, with generation before and after.

    python examples/continued_pretraining.py --model SmolLM2-135M --text corpus.txt

The model is any causal language model's folder (or its name, where a hub can be reached). The first merge makes up for
what quantization rounds away: `initial_weights` are the folder's own. The second method leaves them out, to show it.
"""

import argparse
from pathlib import Path

import torch
from compare import Result, compare, measured
from loop import fit
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from loqt_scale import LoQTConfig, MergeConfig

PROMPT = "The most important thing about"


def windows(file: Path, tokenizer, length: int) -> tuple[Tensor, Tensor]:
    """(training, held-out) windows of so many tokens; the last tenth of the text is held out."""
    text = file.read_text(errors="ignore")[: OPTIONS.characters]
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    return rows[: -max(1, len(rows) // 10)], rows[-max(1, len(rows) // 10) :]


@torch.no_grad()
def held_out_loss(model, rows: Tensor) -> float:
    """Nats a token."""
    model.eval()
    found = sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.split(4))
    model.train()
    return found / len(rows)


@torch.no_grad()
def write(model, tokenizer) -> str:
    """What the model makes of the prompt, greedily."""
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    found = model.eval().generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
    return tokenizer.decode(found[0])


def train(method: str, seed: int, rate: float, short: bool) -> Result:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(OPTIONS.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(OPTIONS.model)
    training, held_out = windows(OPTIONS.text, tokenizer, 16 if short else 64)
    held_out = held_out[: 2 if short else 32]
    text = f"before: {held_out_loss(model, held_out):.4f} nats | {write(model, tokenizer)!r}"
    width = model.config.hidden_size
    config = LoQTConfig(rank=width // 4, merge=MergeConfig(gap=10))

    def loss_of() -> Tensor:
        rows = training[torch.randint(len(training), (4,))]
        return model(input_ids=rows, labels=rows).loss

    low_rank, compensated = config if method.startswith("loqt") else None, method == "loqt"
    steps = 3 if short else OPTIONS.steps
    settings = {"steps": steps, "rate": rate, "seed": seed, "compensated": compensated}
    optimizer, curve = fit(model.train(), loss_of, low_rank, **settings)
    score = held_out_loss(model, held_out)
    text += f"\nafter: {score:.4f} nats | {write(model, tokenizer)!r}"
    print(text, flush=True)
    return measured(score, curve, model, optimizer, text)


parser = argparse.ArgumentParser(add_help=False)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
parser.add_argument("--text", type=Path, required=True)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--characters", type=int, default=1_000_000)
OPTIONS, _ = parser.parse_known_args()
if __name__ == "__main__":
    rates = {"loqt": [3e-4, 1e-4, 1e-3], "loqt without initial_weights": [3e-4], "full": [1e-4, 5e-5, 2e-5, 2e-4]}
    compare(train, name="continued_pretraining", score="held-out nats a token", curve="training loss", rates=rates)
