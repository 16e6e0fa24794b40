"""The part of benchmarks/gpu.py that measures memory: the highest moment of a step and of a merge step, by method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from common import ROOT, table
from gpu_common import RANKS, DeviceWeights, Place, Table, free, gibibytes
from gpu_speed import galore_update
from memory import DOUBLE, LEAN, METHODS, PER_LAYER

from loqt_scale.config import RunConfig
from loqt_scale.config.sizes import OUTSIDE
from loqt_scale.config.yaml import parse_run_config
from loqt_scale.plan import plan_run
from tests.distributed.footprint_tasks import device_peaks, make_trainer, warm_up
from tests.distributed.pool import RankPool

SEQUENCES = 4  # a step's, in one pass
CAP = 24 * 10**9  # bytes: the card that 13b should train on
VOCABULARY = 32128
GALORE = "GaLore"


@dataclass(frozen=True)
class Measured:
    """Bytes; None: no such step, or it did not fit."""

    step: int | None = None
    merge: int | None = None
    reserved: int | None = None
    fits: bool = True


HEADER = ["model", "method", "step, GiB", "planned", "merge step, GiB", "planned", "reserved", "highest / full's plan"]


def memory(place: Place, repeats: int) -> Iterator[Table]:
    """Peaks of every method at 1b and 7b."""
    rows: list[list[object]] = []
    for preset in place.presets("llama_1b", "llama_7b"):
        for name, words in methods().items():
            # a merge at step 0 costs a minute at 7b, and a second one as much again
            rows.append(method_row(place, preset, name, words, brief=preset == "llama_7b"))
            print(rows[-1], flush=True)
            free(place)
            yield place.title("GPU: memory"), f"{table(HEADER, rows)}\n\n{memory_notes(place)}"


def memory_notes(place: Place) -> str:
    """What the columns mean."""
    return (
        f"{SEQUENCES} sequences a step in one pass, blocks recomputed. {place.notes()} "
        "Measured: the most that torch's allocator had given out at once, less what cuBLAS holds for good; "
        "`reserved`: the most that it had taken from the device. Planned: `loqt-scale plan`. GaLore's peak is that of "
        "a step without an SVD."
    )


def cap(place: Place, repeats: int) -> Iterator[Table]:
    """Real steps and a merge of 13b, and of 7b, where torch's allocator may take 24 GB."""
    lines: list[str] = []
    for preset in place.presets("llama_13b", "llama_7b"):
        lines.append(lean_sentence(place, preset))
        free(place)
        yield place.title(f"GPU: training where torch may take {CAP / 1e9:.0f} GB"), "\n\n".join(lines)


def methods() -> dict[str, list[str]]:
    """Settings by name, in the order of the table."""
    (full, words), *others = METHODS.items()
    return {full: words, GALORE: words, **dict(others)}


def run_config(place: Place, preset: str, words: list[str]) -> RunConfig:
    """The run of a row."""
    steps = [f"--train.global_batch_size={SEQUENCES}", f"--train.micro_batch_size={SEQUENCES}", "--loqt.merge.gap=2"]
    return parse_run_config(place.words(preset, "--model.activation_checkpointing=true", *steps, *words))


def method_row(place: Place, preset: str, name: str, words: list[str], *, brief: bool) -> list[object]:
    """Measured beside planned."""
    config = run_config(place, preset, words)
    plan = plan_run(config, ranks=1, vocab_size=320).memory
    reference = plan_run(run_config(place, preset, ["--method=full"]), ranks=1, vocab_size=320).memory
    measure = partial(galore_peaks, place) if name == GALORE else partial(peaks, place, brief=brief)
    room = torch.cuda.mem_get_info(place.device)[0] if place.cuda else None
    if name == GALORE and find_spec("galore_torch") is None:
        print("galore-torch is not installed: no row for it (pip install galore-torch)", flush=True)
        return [preset, name, "not installed", *["-"] * 5]
    hopeless = room is not None and name != GALORE and plan.peak > 1.15 * room
    found = Measured(fits=False) if hopeless else measure(config)
    highest = max(found.step or 0, found.merge or 0)
    planned = [gibibytes(size) if size and name != GALORE else "-" for size in (plan.step_peak, plan.merge_peak)]
    ratio = f"{highest / reference.peak:.3f}" if highest else "-"
    return [
        preset,
        name,
        said(found, found.step),
        planned[0],
        said(found, found.merge),
        planned[1],
        *tail(found, ratio),
    ]


def said(found: Measured, size: int | None) -> str:
    """A size, a dash, or that there was no room."""
    if not found.fits:
        return "does not fit"
    return "-" if size is None else gibibytes(size)


def tail(found: Measured, ratio: str) -> list[object]:
    """The last two cells of a row."""
    return ["-" if found.reserved is None else gibibytes(found.reserved), ratio]


def peaks(place: Place, config: RunConfig, *, brief: bool) -> Measured:
    """Of a run: a normal step, and a step with a merge (`brief`: the first one, at step 0)."""
    if not place.cuda:
        pool = RankPool()  # the CPU's count includes what other parts have left in this process
        found = pool.run(1, "tests.distributed.footprint_tasks:measured_peaks", config=config)[0]
        pool.close()
    else:
        weights = lambda own: DeviceWeights(own, place.device)  # noqa: E731
        found = {}
        with suppress(torch.OutOfMemoryError):
            found = device_peaks(config, place.device, weights, first_merge=brief, say=stopwatch(config.model.preset))
    return Measured(found.get("step"), found.get("merge"), found.get("reserved"), fits=bool(found))


def stopwatch(preset: str) -> Callable[[str], object]:
    """Prints what has been done, and the seconds since now: what is known of a run that its time limit ends."""
    started = time.perf_counter()
    return lambda stage: print(f"{preset}: {stage} after {time.perf_counter() - started:.1f} s", flush=True)


def galore_peaks(place: Place, config: RunConfig) -> Measured:
    """Of full-rank training's model under GaLore's optimizer: a normal step."""
    with suppress(torch.OutOfMemoryError):
        before = allocated_before(place)
        trainer = make_trainer(config, place.device, lambda own: DeviceWeights(own, place.device))
        update = galore_update(trainer)
        for step in (0, 1):
            if place.cuda:
                torch.cuda.reset_peak_memory_stats(place.device)
            trainer.accumulate(step)
            update()
        if not place.cuda:  # to see that it runs
            return Measured()
        most = torch.cuda.max_memory_allocated(place.device) - before
        return Measured(step=most, reserved=torch.cuda.max_memory_reserved(place.device))
    return Measured(fits=False)


def allocated_before(place: Place) -> int:
    """Bytes that are there before a model is, those that the device's libraries take for good among them."""
    if not place.cuda:
        return 0
    warm_up(place.device)
    return torch.cuda.memory_allocated(place.device)


# ---- 13b on 24 GB --------------------------------------------------------------------------------------------------


def lean_config(place: Place, preset: str) -> RunConfig:
    """The shipped settings with what `loqt-scale plan` proposes for one card of 24 GB, on the embedded corpus."""
    shipped = "llama_13b" if place.quick else preset
    words = [f"--config={ROOT / 'configs' / f'{shipped}.yaml'}", *LEAN, *PER_LAYER, *DOUBLE]
    words += ["--data.dataset=null", "--data.dataset_config=null", "--data.tokenizer=bytes", "--loqt.merge.gap=2"]
    words += [f'--model.overrides={{"vocab_size": {VOCABULARY}}}', "--data.max_eval_sequences=2"]
    words += [f"--train.global_batch_size={SEQUENCES}", f"--train.micro_batch_size={SEQUENCES}"]
    words += ["--parallel.strategy=single", f"--train.run_dir={place.folder / 'run'}", "--train.progress=off"]
    if place.quick:
        words += [f"--model.preset={preset}", f"--loqt.rank={RANKS[preset]}", "--data.seq_len=64"]
        words += [f'--model.overrides={{"vocab_size": {place.vocabulary}}}']
    return parse_run_config(words)


def lean_sentence(place: Place, preset: str) -> str:
    """A sentence on real steps and a merge of a shape under the cap."""
    config = lean_config(place, preset)
    plan = plan_run(config, ranks=1, vocab_size=320).memory
    started = time.perf_counter()
    with capped(place):
        found = peaks(place, config, brief=True)
    planned = f"planned {gibibytes(plan.step_peak)} and {gibibytes(plan.merge_peak)} GiB"
    if not found.fits:
        return f"**{preset} does not fit in {CAP / 1e9:.0f} GB**: out of memory under the cap ({planned})."
    return (
        f"**{preset} in {CAP / 1e9:.0f} GB** (configs/{preset}.yaml, 8-bit states, bfloat16 factors, per-layer "
        f"updates, double quantization, {SEQUENCES} sequences a step, vocabulary {VOCABULARY}; torch may not "
        f"take more): a step {said(found, found.step)} GiB, a merge step {said(found, found.merge)} GiB ({planned}), "
        f"reserved {said(found, found.reserved)} GiB. Outside of torch the process held {outside_torch(place)} "
        f"({OUTSIDE / 2**20:.0f} MiB are what `plan` sets aside). Weights drawn and quantized, a merge "
        f"step and a step: {time.perf_counter() - started:.0f} s."
    )


@contextmanager
def capped(place: Place) -> Iterator[None]:
    """Torch's allocator refuses what goes beyond the cap."""
    if not place.cuda:
        yield
        return
    total = torch.cuda.get_device_properties(place.device).total_memory
    free(place)
    torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / total), place.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, place.device)
        free(place)


def outside_torch(place: Place) -> str:
    """What the device holds that torch has not reserved: contexts and libraries, of other processes, too."""
    if not place.cuda:
        return "-"
    available, total = torch.cuda.mem_get_info(place.device)
    return f"{(total - available - torch.cuda.memory_reserved(place.device)) / 2**20:.0f} MiB"
