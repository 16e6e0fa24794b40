"""Bytes of the optimizer: its states, what an update takes in passing, what Muon's ranks exchange."""

from __future__ import annotations

from collections.abc import Iterator

from loqt_scale.config import OptimConfig, RunConfig, TrainConfig
from loqt_scale.config.blocks import row_block
from loqt_scale.optim.fragment import chunk_values
from loqt_scale.optim.muon import gram_side, muon_waves
from loqt_scale.plan.shapes import ModelShapes, ParameterShape
from loqt_scale.strategies import resolve_device

FLOAT, DOUBLE = 4, 8  # bytes
UPDATE_BYTES = 44  # a value, of a streamed update's chunk: float32 copies, 64-bit hashes of the rounding
GRAM_COPIES = 7  # of a wave's Gram matrices: as summed, stacked, and what the iteration has in hand


def moment_bytes(parameter: ParameterShape, optim: OptimConfig, ranks: int) -> int:
    """The moments of the largest share: Adam's two, Muon's one."""
    values = parameter.values(ranks)
    block = row_block(parameter.row_values) if optim.states == "int8" else 0
    moments = 1 if optim.name == "muon" and parameter.low_rank else 2
    return moments * (values + values // block * FLOAT if block else values * FLOAT)


def update_scratch(config: RunConfig, shapes: ModelShapes, ranks: int) -> int:
    """What an update of one parameter, or with Muon of a few, takes in passing, beyond gradients; 0 for torch's own."""
    if not config.streams_updates:
        return 0
    largest = max((p.values(ranks) for p in shapes.parameters if p.trains), default=0)
    chunk = UPDATE_BYTES * min(largest, chunk_values(device_type(config.train)))
    return chunk + max((_wave_bytes(wave, ranks) for wave in waves(config.optim, shapes, ranks)), default=0)


def waves(optim: OptimConfig, shapes: ModelShapes, ranks: int) -> Iterator[list[ParameterShape]]:
    """What Muon updates together: one parameter inside the backward pass, else as many as `StreamedMuon` takes."""
    taken = [p for p in shapes.parameters if p.low_rank] if optim.name == "muon" else []
    if optim.per_layer:
        yield from ([parameter] for parameter in taken)
        return
    for wave in muon_waves([_matrix(p) for p in taken], ranks):
        yield [taken[index] for index in wave]


def muon_bytes(optim: OptimConfig, shapes: ModelShapes) -> int:
    """Payload of Muon's all-reduces of a step on several ranks.

    An upper triangle in float64 for each tall matrix, the whole float32 matrix for each wide one.
    """
    matrices = [_matrix(p) for p in shapes.parameters if p.low_rank] if optim.name == "muon" else []
    return sum(FLOAT * rows * n if rows < n else DOUBLE * (n * (n + 1) // 2) for rows, n in matrices)


def device_type(train: TrainConfig) -> str:
    """Where the run will be: `auto` is taken for what is here, though a GPU may be meant (it is about megabytes)."""
    return resolve_device("auto").type if train.device == "auto" else train.device


def _matrix(parameter: ParameterShape) -> tuple[int, int]:
    return parameter.shape[0], parameter.row_values


def _wave_bytes(wave: list[ParameterShape], ranks: int) -> int:
    """Momenta of all, one's product, Gram matrices."""
    size, of_rows = gram_side(*_matrix(wave[0]))
    values = [p.values(1 if of_rows else ranks) for p in wave]
    return FLOAT * (sum(values) + max(values)) + DOUBLE * GRAM_COPIES * len(wave) * size**2
