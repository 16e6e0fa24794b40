"""How much of a gradient's energy P keeps, by the method that finds it: in a pretrained model, on real text.

Dense gradients of all linears of some blocks, of one step; for each the exact singular vectors, the randomized method,
and sketches of several widths. The share of the energy that P keeps is exact, of the dense gradient.

    python benchmarks/subspace.py --folder MODEL --text FILE                       # 2,048 tokens
    python benchmarks/subspace.py --folder MODEL --text FILE --sequences 64        # 16,384
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import torch
from common import publish, table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from loqt_scale.functional import projection as P
from loqt_scale.functional.low_rank_linear import resolve_side

SEQ_LEN = 256
WIDTHS = (1.0, 0.25, 0.0)  # oversampling


def gradients(options: argparse.Namespace) -> Iterator[tuple[str, Tensor]]:
    """(kind of linear, its weight gradient), of the blocks looked at."""
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    text = Path(options.text).read_text(encoding="utf-8", errors="ignore")[: 12 * options.sequences * SEQ_LEN]
    tokens = torch.tensor(tokenizer(text)["input_ids"][: options.sequences * SEQ_LEN]).view(-1, SEQ_LEN)
    for row in tokens.split(1):
        (model(input_ids=row, labels=row).loss / len(tokens)).backward()
    count = model.config.num_hidden_layers
    looked_at = {str(block) for block in (count // 10, count // 2, count - 1)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and looked_at & set(name.split(".")):
            assert module.weight.grad is not None
            yield name.rpartition(".")[2], module.weight.grad


def kept(gradient: Tensor, divisor: int) -> dict[str, float]:
    """The share of its energy that P keeps, by method."""
    out_features, in_features = gradient.shape
    rank, side = min(gradient.shape) // divisor, resolve_side("auto", out_features, in_features)
    matrix = gradient.T if side == "input" else gradient
    omega = P.test_matrix(matrix.shape[1], seed=1, device=matrix.device)
    bases = {
        "best": P.svd_basis(gradient, rank, side),
        "randomized": P.randomized_basis(gradient, rank, side, oversampling=0.0, power_iterations=2, seed=1),
    }
    for oversampling in WIDTHS:
        width = P.sketch_width(rank, out_features, in_features, oversampling)
        bases[f"sketch, l = {1 + oversampling:g} r"] = P.sketch_basis(P.times_test_matrix(matrix, omega, width), rank)
    return {name: float(P.captured_energy(gradient, basis, side)) for name, basis in bases.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="of a pretrained model")
    parser.add_argument("--text", required=True, help="file of text")
    parser.add_argument("--sequences", type=int, default=8, help=f"of {SEQ_LEN} tokens, in the one step")
    parser.add_argument("--divisor", type=int, default=4, help="r = the layer's smaller side over this")
    parser.add_argument("--quick", action="store_true", help="does not touch RESULTS.md")
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    for kind, gradient in gradients(options):
        found.setdefault(kind, []).append(kept(gradient, options.divisor))
    methods = list(next(iter(found.values()))[0])
    rows = [
        [kind, *(f"{fmean(layer[method] for layer in layers):.3f}" for method in methods)]
        for kind, layers in found.items()
    ]
    tokens = options.sequences * SEQ_LEN
    publish(
        f"What P keeps of a gradient, {Path(options.folder).name}, {tokens} tokens",
        f"python benchmarks/subspace.py --folder {Path(options.folder).name} --text {Path(options.text).name} "
        f"--sequences {options.sequences}",
        f"{table(['linear', *methods], rows)}\n\nShare of the gradient's squared norm, means over three blocks; r is a "
        f"{options.divisor}th of each layer's smaller side. `best`: singular vectors; `randomized`: two passes of "
        "subspace iteration.",
        keep=not options.quick,
    )


if __name__ == "__main__":
    main()
