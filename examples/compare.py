"""What the examples share: LoQT against full rank over seeds, as a table and a figure.

    python examples/NAME.py                    both methods, three seeds, the table and NAME.png in runs/examples
    python examples/NAME.py --sweep            one seed of every learning rate that was tried, in place of the best
    python examples/NAME.py --short            seconds: to see that it works

Finished runs are kept in the folder (`results.jsonl`); the same command goes on after the last of them.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import nn


@dataclass
class Result:
    """One run: its score, a curve of (step, value), bytes of the weights and the optimizer's states."""

    score: float
    curve: list[tuple[float, float]]
    weight_bytes: int
    state_bytes: int


def measured(score: float, curve: list[tuple[float, float]], model: nn.Module, optimizer) -> Result:
    """A result, with the bytes of a model and its optimizer."""
    states = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    return Result(score, curve, _bytes(model.parameters()), _bytes(states))


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def compare(
    train: Callable[[str, int, float, bool], Result], *, name: str, score: str, curve: str, rates: dict[str, list[float]]
) -> dict[str, list[Result]]:
    """Runs `train(method, seed, rate, short)` for all, prints the table, draws the figure.

    Args:
        train: One run.
        name: The example's.
        score: What `Result.score` is.
        curve: What the curve's values are.
        rates: Learning rates by method, the best first: the rest is for `--sweep`.
    """
    parser = argparse.ArgumentParser(description=name)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sweep", action="store_true", help="every learning rate, one seed")
    parser.add_argument("--short", action="store_true", help="seconds")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"))
    args, _ = parser.parse_known_args()
    folder = args.out / (f"{name}-short" if args.short else name)
    folder.mkdir(parents=True, exist_ok=True)
    seeds = range(1 if args.sweep or args.short else args.seeds)
    runs = [(m, rate, seed) for m in rates for rate in (rates[m] if args.sweep else rates[m][:1]) for seed in seeds]
    found: dict[str, list[Result]] = {}
    for method, rate, seed in runs:
        result = _kept_or_run(folder / "results.jsonl", train, method, seed, rate, args.short)
        found.setdefault(f"{method} lr {rate:g}", []).append(result)
    print(table(found, score))
    draw(found, curve, args.out / f"{folder.name}.png")
    return found


def _kept_or_run(file: Path, train: Callable[..., Result], method: str, seed: int, rate: float, short: bool) -> Result:
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for line in lines:
        if line["run"] == [method, seed, rate]:
            return Result(**line["result"])
    started = time.perf_counter()
    result = train(method, seed, rate, short)
    seconds = time.perf_counter() - started
    print(f"{method}, seed {seed}, learning rate {rate:g}: {result.score:.4g} ({seconds:.0f} s)", flush=True)
    with file.open("a") as out:
        out.write(json.dumps({"run": [method, seed, rate], "seconds": seconds, "result": asdict(result)}) + "\n")
    return result


def table(found: dict[str, list[Result]], score: str) -> str:
    """Markdown: mean and standard deviation over seeds, bytes."""
    lines = [f"| | {score} | seeds | weights, MB | optimizer's states, MB |", "| --- | --- | --- | --- | --- |"]
    for label, results in found.items():
        scores = [result.score for result in results]
        spread = f" ± {stdev(scores):.2g}" if len(scores) > 1 else ""
        weights, states = results[0].weight_bytes / 1e6, results[0].state_bytes / 1e6
        lines.append(f"| {label} | {mean(scores):.4g}{spread} | {len(scores)} | {weights:.2f} | {states:.2f} |")
    return "\n".join(lines)


def draw(found: dict[str, list[Result]], curve: str, file: Path) -> None:
    """One line for each run, one colour for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for index, (label, results) in enumerate(found.items()):
        for result in results:
            axes.plot(*zip(*result.curve, strict=True), color=f"C{index}", label=label if result is results[0] else None)
    axes.set(xlabel="steps", ylabel=curve)
    axes.legend()
    figure.savefig(file, dpi=100, bbox_inches="tight")
    pyplot.close(figure)
