"""Memory and step time of a layer of experts: LoQT beside the dense layer, beside a module for each expert, and beside
MLPs of as many weights and of as many as a token meets.

A step is forward and backward of the experts and AdamW's update. The layers take turns, the first turn is not counted;
the last column is the median of the ratio to the dense experts of the same turn. Bytes are those of weights, gradients
and the optimizer's states, and those of the highest moment of a step: on a CPU by the allocator's log, of a step
that is not timed. Run it on an idle machine.

    python benchmarks/experts.py           # shapes of OLMoE and Mixtral, smaller on a CPU
    python benchmarks/experts.py --quick   # a small shape, to see that it runs
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from common import publish, table
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from loqt_scale import LoQTConfig, convert_to_loqt
from tests.distributed.instruments import allocations

HEADER = [
    "experts",
    "width",
    "inner",
    "rank",
    "layer",
    "weights, MB",
    "gradients, MB",
    "states, MB",
    "peak, MB",
    "ms",
    "of dense",
]


@dataclass(frozen=True)
class Shape:
    """A layer of experts.

    Args:
        experts: E.
        width: H.
        inner: Of one expert.
        choices: Experts of a token.
        rank: r.
        tokens: In a step.
    """

    experts: int
    width: int
    inner: int
    choices: int
    rank: int
    tokens: int


QUICK = [Shape(4, 64, 128, 2, 16, 64)]
SMALL = [Shape(8, 256, 512, 2, 64, 1024), Shape(32, 256, 128, 4, 32, 1024)]
LARGE = [Shape(64, 2048, 1024, 8, 128, 8192), Shape(8, 4096, 14336, 2, 256, 8192)]


class Mlp(nn.Module):
    """A gated MLP; as a layer of experts it is given choices, and has none."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor, *choices: Tensor) -> Tensor:
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


class Each(nn.Module):
    """Experts that are a module each, in a loop over those that have tokens: transformers 4's form."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Mlp(shape.width, shape.inner) for _ in range(shape.experts))

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        found = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            rows, choice = torch.where(index == number)
            found = found.index_add(0, rows, expert(hidden[rows]) * weights[rows, choice, None])
        return found


def layers_of(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The layers that are compared."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=shape.width, intermediate_size=shape.inner, num_local_experts=shape.experts, hidden_act="silu"
    )
    config._experts_implementation = "grouped_mm"
    layers: dict[str, nn.Module] = {"dense experts": MixtralExperts(config), "LoQT experts": MixtralExperts(config)}
    layers["LoQT, a module each"] = Each(shape)
    for kind, inner in (
        ("as many weights", shape.experts * shape.inner),
        ("as many active", shape.choices * shape.inner),
    ):
        layers |= {f"{method} MLP, {kind}": Mlp(shape.width, inner) for method in ("dense", "LoQT")}
    for name, layer in layers.items():
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.02)
        layer.to(device, dtype)
        if name.startswith("LoQT"):
            convert_to_loqt(layer, LoQTConfig(rank=shape.rank))
    return layers


def step_of(layer: nn.Module, optimizer: torch.optim.Optimizer, shape: Shape, inputs: tuple[Tensor, ...]) -> None:
    """Forward, backward and update."""
    hidden = inputs[0].clone().requires_grad_()
    layer(hidden, *inputs[1:]).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def passing_bytes(run: Callable[[], None]) -> int:
    """CPU memory that a call takes beyond what is there before it, at its highest moment."""
    with allocations() as made:
        run()
    return made.kept + made.passing


def timed(run: Callable[[], None], device: torch.device) -> tuple[float, int]:
    """(milliseconds, device memory that it takes in passing, bytes) of one call."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else held
    return 1e3 * (time.perf_counter() - started), peak - held


@dataclass
class Contender:
    """A layer, its optimizer, and what its steps took: (milliseconds, highest bytes) of each; `passing`: on a CPU."""

    name: str
    layer: nn.Module
    optimizer: torch.optim.Optimizer
    steps: list[tuple[float, int]] = field(default_factory=list)
    passing: int = 0


def race(shape: Shape, device: torch.device, dtype: torch.dtype, turns: int) -> list[Contender]:
    """Layers in turn, so that whatever else the machine does falls on all of them; the first turn is not counted."""
    hidden = torch.randn(shape.tokens, shape.width, device=device, dtype=dtype)
    weights, index = torch.rand(shape.tokens, shape.experts, device=device).topk(shape.choices, dim=-1)
    inputs, contenders = (hidden, index, weights.to(dtype)), []
    for name, layer in layers_of(shape, device, dtype).items():
        trained = [p for p in layer.parameters() if p.requires_grad]
        contenders.append(Contender(name, layer, torch.optim.AdamW(trained, lr=1e-4)))
    for turn in range(turns + 1):
        for each in contenders:
            step = timed(partial(step_of, each.layer, each.optimizer, shape, inputs), device)
            each.steps += [step] if turn else []
    for each in contenders if device.type == "cpu" else []:
        each.passing = passing_bytes(partial(step_of, each.layer, each.optimizer, shape, inputs))
    return contenders


def measure(shape: Shape, device: torch.device, dtype: torch.dtype, turns: int) -> list[list[object]]:
    """A row for each layer: bytes, the median time, and the median over turns of its time as a part of the first's."""
    contenders, rows = race(shape, device, dtype, turns), []
    for each in contenders:
        trained = [p for p in each.layer.parameters() if p.requires_grad]
        states = [v for s in each.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
        sizes = [sum(t.nbytes for t in part) / 1e6 for part in (each.layer.parameters(), trained, states)]
        peak = max(each.passing, *(peak for _, peak in each.steps)) / 1e6 + sizes[0] + sizes[2]
        ratios = [mine / first for (mine, _), (first, _) in zip(each.steps, contenders[0].steps, strict=True)]
        cells = [*(f"{size:.1f}" for size in sizes), f"{peak:.1f}"]
        cells += [f"{statistics.median(ms for ms, _ in each.steps):.1f}", f"{statistics.median(ratios):.2f}"]
        rows.append([shape.experts, shape.width, shape.inner, shape.rank, each.name, *cells])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--turns", type=int, default=10)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = QUICK if args.quick else LARGE if device.type == "cuda" else SMALL
    turns, load = 2 if args.quick else args.turns, os.getloadavg()[0]
    rows = [row for shape in shapes for row in measure(shape, device, dtype, turns)]
    tokens = ", ".join(str(shape.tokens) for shape in shapes)
    text = f"One step of {dtype}, AdamW; tokens {tokens}; {turns} turns; the machine's load was {load:.0f}.\n\n"
    text += table(HEADER, rows)
    publish("Layers of experts", f"python benchmarks/experts.py --turns {turns}", text, keep=not args.quick)


if __name__ == "__main__":
    main()
