"""What a run of an example leaves: its result, the table and the figure of several."""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import nn
from torch.distributed.tensor import DTensor

Curve = list[tuple[float, float]]


@dataclass
class Result:
    """One run: its score, a curve of (step, value), bytes of the weights and the optimizer's states, what it wrote."""

    score: float
    curve: Curve
    weight_bytes: int
    state_bytes: int
    text: str = ""


def means(losses: list[float], width: int = 10) -> Curve:
    """Means of so many steps each."""
    parts = [losses[at : at + width] for at in range(0, len(losses), width)]
    return [(at * width + len(part), mean(part)) for at, part in enumerate(parts)]


def measured(score: float, curve: Curve, model: nn.Module, optimizer, text: str = "", copies=()) -> Result:
    """A result, with the bytes that this rank holds of a model, of an engine's copies, of the optimizer's states."""
    states = [
        tensor
        for state in optimizer.state.values()
        for value in state.values()
        for tensor in ([value] if torch.is_tensor(value) else value.tensors())  # `muon` keeps its moments in chunks
    ]
    weights, moments = (sum(map(_bytes_here, part)) for part in ((*model.parameters(), *copies), states))
    return Result(score, curve, weights, moments, text)


def _bytes_here(tensor) -> int:
    part = getattr(tensor, "ds_tensor", tensor)  # what ZeRO 3 keeps
    part = part.to_local() if isinstance(part, DTensor) else part
    return part.numel() * part.element_size()


def table(found: dict[str, list[Result]], score: str, each: str = "") -> str:
    """Markdown: mean and standard deviation over seeds, bytes."""
    head = f"| | {score} | seeds | weights, MB{each} | optimizer's states, MB{each} |"
    lines = [head, "| --- | --- | --- | --- | --- |"]
    for label, results in found.items():
        scores = [result.score for result in results]
        spread = f" ± {stdev(scores):.2g}" if len(scores) > 1 else ""
        weights, states = results[0].weight_bytes / 1e6, results[0].state_bytes / 1e6
        lines.append(f"| {label} | {mean(scores):.4g}{spread} | {len(scores)} | {weights:.2f} | {states:.2f} |")
    return "\n".join(lines)


def draw(found: dict[str, list[Result]], curve: str, file: Path) -> None:
    """A line for the mean over seeds, a band from the lowest to the highest."""
    import matplotlib
    import numpy

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    for label, results in found.items():
        steps = [step for step, _ in results[0].curve]
        values = numpy.array([[value for _, value in result.curve] for result in results])
        axes.plot(steps, values.mean(0), label=label)
        axes.fill_between(steps, values.min(0), values.max(0), alpha=0.2)
    axes.set(xlabel="steps", ylabel=curve)
    axes.legend()
    figure.savefig(file, dpi=80, bbox_inches="tight")
    pyplot.close(figure)
