"""Part of benchmarks/gpu.py: what an update costs, AdamW's and Muon's, with float32 and with small states."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from common import table
from gpu_common import STEP_TOKENS, Place, Table, for_each, resize
from gpu_speed import StepTime, measure_step
from optimizers import VARIANTS
from step_time import measured_in_turns

from loqt_scale.training.trainer import Trainer
from tests.distributed.footprint_tasks import kinds_held

SEQUENCES = 16  # a pass
HEADER = ["model", "optimizer", "state, MiB", "update, ms", "/ AdamW's", "of a step's time"]


def optimizers(place: Place, repeats: int) -> Iterator[Table]:
    """Updates of LoQT's factors and of the rest, all variants in turns."""
    shapes = place.presets("llama_350m", "llama_1b")
    for found in for_each(place, shapes, lambda preset: optimizer_rows(place, preset, repeats)):
        text = (
            f"{table(HEADER, [row for rows in found.values() for row in rows])}\n\n{place.notes()} LoQT; an update "
            f"clips and applies the gradients of one step, {repeats} rounds, all variants in turns; medians. `of a "
            f"step's time`: of {STEP_TOKENS} tokens in passes of {2 if place.quick else SEQUENCES} sequences, blocks "
            "not compiled. Muon's factors have one moment; embeddings, norms and head are AdamW's."
        )
        yield place.title("GPU: what an update costs"), text


def optimizer_rows(place: Place, preset: str, repeats: int) -> list[list[object]]:
    """One row a variant."""
    trainers = {}
    for name, words in VARIANTS.items():
        trainers[name] = place.trainer(preset, "--loqt.merge.gap=900", *words)
        resize(trainers[name], sequences=2 if place.quick else SEQUENCES, passes=1)
        measure_step(place, trainers[name], 1)  # makes the states
    measure = lambda name, turn: measure_step(place, trainers[name], 2 + turn)  # noqa: E731
    times = measured_in_turns(list(VARIANTS), repeats, measure)
    return [_row(place, preset, name, trainers[name], times) for name in VARIANTS]


def _row(place: Place, preset: str, name: str, trainer: Trainer, times: dict[str, list[StepTime]]) -> list[object]:
    passes = place.batch / trainer.config.train.micro_batch_size
    update, first = (statistics.median(time.update for time in times[key]) for key in (name, next(iter(VARIANTS))))
    share = statistics.median(time.update / time.of(passes) for time in times[name])
    size = kinds_held(trainer)["adam"]
    row: list[object] = [preset, name, f"{size / 2**20:.1f}", f"{1000 * update:.1f}", f"**{update / first:.2f}**"]
    return [*row, f"{share:.2%}"]
