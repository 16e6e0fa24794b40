"""Bytes of the optimizer: its states, what an update takes in passing, what Muon's ranks exchange."""

from __future__ import annotations

from collections.abc import Iterator

from loqt_scale.config import RunConfig
from loqt_scale.functional.blockwise import row_block
from loqt_scale.optim import WAVE_VALUES
from loqt_scale.optim.fragment import chunk_values
from loqt_scale.plan.shapes import ModelShapes, ParameterShape
from loqt_scale.strategies import resolve_device

FLOAT, DOUBLE = 4, 8  # bytes
UPDATE_BYTES = 44  # a value, of a streamed update's chunk: float32 copies, 64-bit hashes of the rounding
GRAM_COPIES = 7  # of a wave's Gram matrices: as summed, stacked, and what the iteration has in hand


def moment_bytes(parameter: ParameterShape, config: RunConfig, ranks: int) -> int:
    """The moments of the largest share: Adam's two, Muon's one."""
    values = parameter.values(ranks)
    block = row_block(parameter.row_values) if config.optim.states == "int8" else 0
    moments = 1 if config.optim.name == "muon" and parameter.low_rank else 2
    return moments * (values + values // block * FLOAT if block else values * FLOAT)


def update_scratch(config: RunConfig, shapes: ModelShapes, ranks: int) -> int:
    """What an update of one parameter, or with Muon of a few, takes in passing, beyond gradients; 0 for torch's own."""
    if not config.streams_updates:
        return 0
    largest = max((p.values(ranks) for p in shapes.parameters if p.trains), default=0)
    chunk = UPDATE_BYTES * min(largest, chunk_values(device_type(config)))
    return chunk + max((_wave_bytes(wave, ranks) for wave in muon_waves(config, shapes, ranks)), default=0)


def muon_waves(config: RunConfig, shapes: ModelShapes, ranks: int) -> Iterator[list[ParameterShape]]:
    """What Muon updates together: one parameter inside the backward pass, else as many as `StreamedMuon` takes."""
    most = 0 if config.optim.per_layer else WAVE_VALUES * ranks
    wave: list[ParameterShape] = []
    for parameter in shapes.parameters if config.optim.name == "muon" else ():
        if not parameter.low_rank:
            continue
        full = sum(p.values() for p in wave) + parameter.values() > most
        if wave and (full or wave[0].row_values != parameter.row_values):
            yield wave
            wave = []
        wave.append(parameter)
    if wave:
        yield wave


def gram_bytes(config: RunConfig, shapes: ModelShapes) -> int:
    """Payload of the all-reduces of a step of Muon's: an upper triangle in float64 for each matrix."""
    columns = [p.row_values for p in shapes.parameters if p.low_rank]
    return DOUBLE * sum(n * (n + 1) // 2 for n in columns) if config.optim.name == "muon" else 0


def device_type(config: RunConfig) -> str:
    """Where the run will be: `auto` is taken for what is here, though a GPU may be meant (it is about megabytes)."""
    return resolve_device("auto").type if config.train.device == "auto" else config.train.device


def _wave_bytes(wave: list[ParameterShape], ranks: int) -> int:
    """Momenta of all, one's product, Gram matrices."""
    values = [p.values(ranks) for p in wave]
    return FLOAT * (sum(values) + max(values)) + DOUBLE * GRAM_COPIES * len(wave) * wave[0].row_values ** 2
