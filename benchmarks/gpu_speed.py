"""Parts of benchmarks/gpu.py that measure time: throughput, merge, offload."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
from common import table
from gpu_common import STEP_TOKENS, Place, Table, for_each, gibibytes, gpu_peak, largest_pass, resize
from merge import PARTS, Clock
from step_time import count_flops, measured_in_turns, merge_of

from loqt_scale.model.structure import count_parameters, decoder_blocks
from loqt_scale.plan import plan_run
from loqt_scale.training.trainer import Trainer

GOAL = 1.15  # LoQT's tokens a second over full-rank training's
GALORE_GAP = 200  # steps between GaLore's SVDs
OFFLOAD = ("none", "base", "optimizer", "all")
Variant = tuple[str, bool]  # method, compiled


@dataclass(frozen=True)
class StepTime:
    """Seconds of a pass and of an update, measured in one step; passes follow one another without waiting."""

    one_pass: float
    update: float

    def of(self, passes: float) -> float:
        """Seconds of a step of so many passes."""
        return passes * self.one_pass + self.update


def measure_step(place: Place, trainer: Trainer, step: int, update: Callable[[], object] | None = None) -> StepTime:
    """Times a step's passes together, and its update."""
    passes = place.seconds(lambda: trainer.accumulate(step))
    return StepTime(passes / trainer.micro_steps, place.seconds(update or trainer.update))


# ---- throughput --------------------------------------------------------------------------------------------------


class Contest:
    """One shape's methods, taking turns in one process.

    Plain and compiled variants of a method are one model: a block keeps its compiled form beside its plain one. GaLore
    is another optimizer over full-rank training's model.
    """

    def __init__(self, place: Place, preset: str) -> None:
        self.place, self.preset = place, preset
        words = ["--model.compile=true", "--loqt.merge.gap=100"]
        self.full, self.loqt = (place.trainer(preset, *words, f"--method={method}") for method in ("full", "loqt"))
        self.trainers = {"full": self.full, "LoQT": self.loqt}
        self.updates: dict[str, Callable[[], object]] = {"full": self.full.update, "LoQT": self.loqt.update}
        if place.compiled_only:
            pass
        elif find_spec("galore_torch") is None:
            print("galore-torch is not installed: no row for it (pip install galore-torch)", flush=True)
        else:
            self.trainers["GaLore"], self.updates["GaLore"] = self.full, galore_update(self.full)
        self.compiled = {
            trainer: [block._compiled_call_impl for _, block in decoder_blocks(trainer.built.model)]
            for trainer in (self.full, self.loqt)
        }

    @property
    def variants(self) -> list[Variant]:
        """Full-rank training first."""
        return list(product(self.trainers, (True,) if self.place.compiled_only else (False, True)))

    def choose(self, variant: Variant) -> Trainer:
        """The variant's trainer, its blocks compiled or not."""
        method, compiled = variant
        trainer = self.trainers[method]
        blocks = [block for _, block in decoder_blocks(trainer.built.model)]
        for block, form in zip(blocks, self.compiled[trainer], strict=True):
            block._compiled_call_impl = form if compiled else None
        return trainer

    def run(self, repeats: int) -> tuple[int, dict[Variant, list[StepTime]], dict[str, int]]:
        """(sequences a pass, times by variant, FLOPs of a token by method)."""
        for method in ("full", "LoQT"):
            self.choose((method, False))
        merge_of(self.loqt, 0)()  # before it P and B are zero
        sequences = largest_pass(self.place, [(self.trainers[name], update) for name, update in self.updates.items()])
        for trainer in (self.full, self.loqt):
            resize(trainer, sequences=sequences, passes=1)
        tokens = sequences * self.place.seq_len
        flops = {method: count_flops(self.trainers[method]) // tokens for method in ("full", "LoQT")}
        passes = max(1, min(4, self.place.batch // sequences))
        for trainer in (self.full, self.loqt):
            resize(trainer, sequences=sequences, passes=passes)
        for variant in self.variants:
            for step in (1, 2):  # compiles, and fills allocators
                measure_step(self.place, self.choose(variant), step, self.updates[variant[0]])
        measure = lambda variant, turn: measure_step(  # noqa: E731
            self.place, self.choose(variant), 3 + turn, self.updates[variant[0]]
        )
        return sequences, measured_in_turns(self.variants, repeats, measure), flops


def galore_update(trainer: Trainer) -> Callable[[], object]:
    """Clipping and GaLore's AdamW on a full-rank model.

    Its projections are random here, of the right shapes: an SVD of every layer, which it takes every 200 steps, would
    take longer than the rest of the benchmark, and the speed of the steps between does not depend on them.
    """
    from galore_torch import GaLoreAdamW
    from galore_torch.galore_projector import GaLoreProjector

    rank = trainer.config.loqt.rank
    low_rank, rest = (group["params"] for group in trainer.optimizer.param_groups)
    galore = {"rank": rank, "update_proj_gap": GALORE_GAP, "scale": 0.25, "proj_type": "std"}
    groups = [{"params": low_rank, **galore}, {"params": rest}]
    optimizer = GaLoreAdamW(groups, lr=1e-3, no_deprecation_warning=True)
    for parameter in low_rank:
        rows, columns = parameter.shape
        basis = torch.linalg.qr(torch.randn(min(rows, columns), rank, device=parameter.device))[0]
        projector = GaLoreProjector(rank, update_proj_gap=GALORE_GAP, scale=0.25, proj_type="std")
        projector.ortho_matrix = basis.T.contiguous() if rows >= columns else basis
        optimizer.state[parameter] |= {"step": 1, "projector": projector}

    def update() -> None:
        trainer.strategy.step.clip(trainer.parameters, trainer.config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def throughput(place: Place, repeats: int) -> Iterator[Table]:
    """Tokens a second at the papers' batch: full-rank AdamW, LoQT and GaLore, plain and compiled, in turns."""

    def measure(preset: str) -> list[list[object]]:
        torch._dynamo.reset()
        contest = Contest(place, preset)
        rows = throughput_rows(place, contest, *contest.run(repeats))
        print(table(HEADER, rows), flush=True)
        return rows

    for found in for_each(place, place.presets("llama_130m", "llama_350m", "llama_1b"), measure):
        rows = [row for rows in found.values() for row in rows]
        yield place.title("GPU: throughput"), f"{table(HEADER, rows)}\n\n{throughput_notes(place, repeats)}"


def throughput_notes(place: Place, repeats: int) -> str:
    """What the columns mean."""
    return (
        f"{place.notes()} A step is {STEP_TOKENS} tokens: passes and update are timed apart "
        f"in steps of a few passes ({repeats} rounds, all variants in turns, A B B A), and added up; the pass is the "
        "largest power of two of sequences (up to 128) that fits both methods. `over full`: tokens a second over "
        "those of full-rank training, plain over plain and compiled over compiled, median of the rounds (from ... "
        "to). FLOPs are the method's own, activations are kept; MFU counts 6 a parameter outside of the "
        f"embedding. GaLore's SVDs (every {GALORE_GAP} steps) and LoQT's merges (every 100 and more, see below) are "
        f"left out. **Goal: LoQT over full at least {GOAL}.**"
    )


HEADER = ["model", "method", "sequences a pass", "tokens/s", "over full", "update, ms"]
HEADER += ["FLOPs, of full's", "TFLOP/s", "of peak", "MFU"]


def throughput_rows(
    place: Place, contest: Contest, sequences: int, times: dict[Variant, list[StepTime]], flops: dict[str, int]
) -> list[list[object]]:
    """One row a variant."""
    peak, rows = gpu_peak(place), []
    passes = place.batch / sequences
    embedding = contest.full.built.model.get_input_embeddings().weight.numel()
    model_flops = 6 * (count_parameters(contest.full.built.model) - embedding)
    for method, compiled in contest.variants:
        own, base = times[method, compiled], times["full", compiled]
        seconds = statistics.median(time.of(passes) for time in own)
        rate = STEP_TOKENS / seconds
        ratios = sorted(b.of(passes) / a.of(passes) for a, b in zip(own, base, strict=True))
        over = f"**{statistics.median(ratios):.3f}** ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        counted = flops["LoQT" if method == "LoQT" else "full"]
        share = (lambda value: f"{value / peak:.1%}") if peak else (lambda value: "-")
        update = 1000 * statistics.median(time.update for time in own)
        name = f"{method}{', compiled' if compiled else ''}"
        row: list[object] = [contest.preset, name, sequences, f"{rate:,.0f}", over, f"{update:.1f}"]
        row += [f"{counted / flops['full']:.3f}", f"{rate * counted / 1e12:.1f}", share(rate * counted)]
        rows.append([*row, share(rate * model_flops)])
    return rows


# ---- merge -------------------------------------------------------------------------------------------------------


def merge(place: Place, repeats: int) -> Iterator[Table]:
    """Seconds of a merge over those of a step of the papers' batch; where they go."""

    def measure(preset: str) -> tuple[list[object], dict[str, float]]:
        row, parts = merge_row(place, preset, max(1, repeats // 2))
        print(row, flush=True)
        return row, parts

    for found in for_each(place, place.presets("llama_130m", "llama_350m", "llama_1b"), measure):
        yield place.title("GPU: what a merge costs"), merge_tables(place, found)


def merge_tables(place: Place, found: dict[str, tuple[list[object], dict[str, float]]]) -> str:
    """Rows of times, and the parts of a merge by shape."""
    rows, shares = [row for row, _ in found.values()], {preset: parts for preset, (_, parts) in found.items()}
    names = list(dict.fromkeys(part for parts in shares.values() for part in parts))
    split = [[name, *(f"{parts.get(name, 0.0):.3f}" for parts in shares.values())] for name in names]
    header = ["model", "step, s", "sketch, s", "merge, s", "**sketch and merge, in steps**", "of a run's time"]
    return (
        f"{table(header, rows)}\n\n{table(['part of a merge, s', *shares], split)}\n\n{place.notes()} "
        f"A step is {STEP_TOKENS} tokens. `sketch`: what a merge step's passes take longer; `merge`: finding P and all "
        "that follows, without waiting in between; the parts are of a merge that waits for the device at each, so "
        "they add up to more. `of a run's time`: one merge in 100 steps, which is the most."
    )


def merge_row(place: Place, preset: str, repeats: int) -> tuple[list[object], dict[str, float]]:
    """(row of times, seconds by part)."""
    trainer = place.trainer(preset, "--loqt.merge.gap=2")
    merge_of(trainer, 0)()
    sequences = largest_pass(place, [(trainer, trainer.update)])
    resize(trainer, sequences=sequences, passes=1)
    merges, steps, sketched, merged = trainer.merges, [], [], []
    assert merges is not None
    for step in merges.steps[1 : 1 + repeats]:
        steps.append(measure_step(place, trainer, 900))
        merges.prepare(step)
        sketched.append(measure_step(place, trainer, step))
        merged.append(place.seconds(lambda step=step: merges.finish(step)))
    clock = Clock(place.wait)
    with clock.watching(PARTS):
        finish = merge_of(trainer, 1 + repeats)
        clock.times.clear()
        finish()
    passes = place.batch / sequences
    step_seconds = statistics.median(step.of(passes) for step in steps)
    longer = statistics.median(a.one_pass - b.one_pass for a, b in zip(sketched, steps, strict=True)) * passes
    merging = statistics.median(merged)
    in_steps = (longer + merging) / step_seconds
    row: list[object] = [preset, f"{step_seconds:.3f}", f"{longer:.3f}", f"{merging:.3f}"]
    return [*row, f"**{in_steps:.2f}**", f"{in_steps / (100 + in_steps):.2%}"], dict(clock.times.most_common())


# ---- offload -----------------------------------------------------------------------------------------------------


def offload(place: Place, repeats: int) -> Iterator[Table]:
    """Step times of `parallel.offload` none, base, optimizer and all, in turns."""
    preset = place.presets("llama_1b")[0]
    sequences, passes = (2, 2) if place.quick else (16, 2)
    words = ["--loqt.merge.gap=900", "--model.activation_checkpointing=true"]
    trainers: dict[str, Any] = {}
    for what in OFFLOAD:
        trainers[what] = place.trainer(preset, f"--parallel.offload={what}", *words)
        resize(trainers[what], sequences=sequences, passes=passes)
        for step in (0, 1):
            measure_step(place, trainers[what], step)
    measure = lambda what, turn: measure_step(place, trainers[what], 2 + turn)  # noqa: E731
    times = measured_in_turns(OFFLOAD, repeats, measure)
    rows = [offload_row(place, trainers[what], times[what], times["none"], sequences) for what in OFFLOAD]
    for trainer in reversed(trainers.values()):
        trainer.strategy.close()
    header = ["parallel.offload", "pass, ms", "update, ms", "step of 131072 tokens / none's"]
    header += ["planned on the device, GiB", "planned in host memory, GiB"]
    text = (
        f"{table(header, rows)}\n\n{preset}, {sequences} sequences a pass, blocks recomputed, {repeats} rounds in "
        f"turns; medians (from ... to). {place.notes()} P and B are zero here: their values change no time. Where the "
        f"host's cores update, their number counts: torch used {torch.get_num_threads()}."
    )
    yield place.title("GPU: offload"), text


def offload_row(
    place: Place, trainer: Trainer, own: list[StepTime], none: list[StepTime], sequences: int
) -> list[object]:
    """One mode's row."""
    passes = place.batch / sequences
    ratios = sorted(a.of(passes) / b.of(passes) for a, b in zip(own, none, strict=True))
    memory = plan_run(trainer.config, ranks=1, vocab_size=trainer.corpus.tokenizer.vocab_size).memory
    row: list[object] = [trainer.config.parallel.offload]
    row += [f"{1000 * statistics.median(getattr(time, name) for time in own):.1f}" for name in ("one_pass", "update")]
    row += [f"**{statistics.median(ratios):.3f}** ({ratios[0]:.3f} to {ratios[-1]:.3f})"]
    return [*row, gibibytes(memory.step_peak), gibibytes(memory.host)]
