"""Seconds of a step on a machine that is not here, from counted operations and bytes on the wire.

    a pass      each operator takes as long as its FLOPs or its bytes, whichever is more; the host starts kernels
    a step      its passes, or its bytes on the wire if these take longer, and a part of the shorter; the update
    a merge     sketches, factorisations, products in float32, passes over W; rows and layers are shared out over ranks

Nothing here is measured: fractions of peaks are assumptions (`devices.yaml`), calibrated on one H100.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from loqt_scale.config import ModelConfig, RunConfig
from loqt_scale.functional.merge_steps import planned_merges
from loqt_scale.functional.shares import micro_steps
from loqt_scale.merge import probe_shape
from loqt_scale.model.flops import PassFlops
from loqt_scale.optim.fragment import chunk_values
from loqt_scale.plan.activations import OnePass
from loqt_scale.plan.devices import Machine
from loqt_scale.plan.operations import Operation, Operations
from loqt_scale.plan.shapes import ModelShapes
from loqt_scale.plan.spread import Spread
from loqt_scale.plan.traffic import Traffic

Bound = Literal["compute", "memory bandwidth", "network", "host"]
CAUSAL = 0.5  # of attention's counted FLOPs, what is not masked
FUSED_UPDATE_BYTES = 36  # a value: read gradient, parameter, two moments, write three; the norm, the clipping
STREAMED_UPDATE_BYTES, STREAMED_KERNELS = 320, 40  # a value, and of a chunk: about forty float32 operators
COMPILED_UPDATE_BYTES, UPDATE_KERNELS = 40, 80  # a value, read twice; two groups' counts, rates and seeds
TERA, GIGA, MICRO = 1e12, 1e9, 1e-6


@dataclass(frozen=True)
class Speed:
    """A planned step.

    Args:
        tokens: Of a step, over all ranks.
        ranks: N.
        compute: Seconds of a step in operators bound by FLOPs, on a rank.
        memory: Seconds in operators bound by memory bandwidth, the update among them.
        host: Seconds in which the host starts kernels.
        network: Seconds of the bytes on the wire.
        step: Seconds of a step without merges.
        merge: Seconds that a merge adds to its step.
        merges: Merges of a step, on average over the run.
        flops: FLOPs that a rank executes in a step.
        model_flops: FLOPs of a step over all ranks without what is recomputed: the numerator of MFU.
        peak: FLOP/s of a GPU.
    """

    tokens: int
    ranks: int
    compute: float
    memory: float
    host: float
    network: float
    step: float
    merge: float
    merges: float
    flops: float
    model_flops: float
    peak: float

    @property
    def seconds(self) -> float:
        """Of a step with its share of merges."""
        return self.step + self.merges * self.merge

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs over time and peak."""
        return self.model_flops / self.seconds / self.ranks / self.peak

    @property
    def bound(self) -> Bound:
        """What a step waits for most."""
        device = self.compute + self.memory
        if self.network > max(device, self.host):
            return "network"
        if self.host > device:
            return "host"
        return "compute" if self.compute >= self.memory else "memory bandwidth"


def planned_speed(
    config: RunConfig,
    shapes: ModelShapes,
    one: OnePass,
    flops: PassFlops,
    spread: Spread,
    traffic: tuple[Traffic, Traffic],
    on: Machine,
) -> Speed:
    """How fast a run will be.

    Args:
        config: The run.
        shapes: Its model.
        one: Its pass.
        flops: What the method asks for in it.
        spread: How it is spread over ranks.
        traffic: Bytes on the wire of a step and of a merge.
        on: The machine.
    """
    train, compiled = config.train, config.model.compile
    passes = micro_steps(train.global_batch_size, spread.data_size, train.micro_batch_size)
    compute, memory = (passes * part for part in _device_seconds(one.operations, on, config.model))
    update, launches = _update(config, shapes, spread, on)
    kernels, launch = passes * sum(_kernels(op, on, compiled) * n for op, n in one.operations.items()), _launch(on)
    network, busy = _wire_seconds(traffic[0], spread, on), max(compute + memory, kernels * launch)
    step = max(busy, network) + on.assumed.unhidden * min(busy, network) + max(update, launches * launch)
    tokens = train.global_batch_size * config.data.seq_len
    return Speed(
        tokens,
        spread.ranks,
        compute,
        memory + update,
        (kernels + launches) * launch,
        network,
        step,
        _merge_seconds(config, shapes, one, spread, passes, on) + _wire_seconds(traffic[1], spread, on),
        _merges_a_step(config),
        passes * sum(op.flops * n for op, n in one.operations.items()),
        flops.model * tokens / flops.tokens,
        on.gpu.peak(config.model.dtype),
    )


def _device_seconds(operations: Operations, on: Machine, model: ModelConfig) -> tuple[float, float]:
    """(bound by FLOPs, bound by bytes) of a pass."""
    compute = memory = 0.0
    for operation, count in operations.items():
        flops, moved = _seconds(operation, on, model)
        compute += count * flops if flops >= moved else 0.0
        memory += count * moved if flops < moved else 0.0
    return compute, memory


def _seconds(operation: Operation, on: Machine, model: ModelConfig) -> tuple[float, float]:
    """(by FLOPs, by bytes) of one call."""
    assumed, peak, rate = on.assumed, on.gpu.peak(model.dtype), on.gpu.bandwidth * GIGA
    moved = operation.bytes / (rate * (assumed.dequantize if operation.kind == "dequantize" else assumed.memory))
    if operation.kind == "other":
        return 0.0, moved * (assumed.fused if model.compile else 1.0)
    if operation.kind == "attention":
        return CAUSAL * operation.flops / (peak * assumed.attention), moved
    return operation.flops / (peak * assumed.products), moved


def _kernels(operation: Operation, on: Machine, compiled: bool) -> float:
    return on.assumed.fused if compiled and operation.kind == "other" else 1.0


def _launch(on: Machine) -> float:
    """Seconds in which the host starts a kernel."""
    return on.assumed.launch_us * MICRO


def _wire_seconds(traffic: Traffic, spread: Spread, on: Machine) -> float:
    """A replica's ring may stay in a node; all others are as fast as what connects all GPUs."""
    inside_rate = on.inside_rate if spread.shard_size <= on.assumed.node_gpus else on.link_rate
    seconds = traffic.inside / inside_rate + (traffic.sent - traffic.inside) / on.link_rate
    return seconds / (GIGA * on.assumed.network)


def _update(config: RunConfig, shapes: ModelShapes, spread: Spread, on: Machine) -> tuple[float, int]:
    """(seconds, kernels beyond a few) of an update of this rank's share."""
    values = [p.values(spread.update_size) for p in shapes.parameters if p.trains]
    a_value, launches = FUSED_UPDATE_BYTES, 0
    if config.streams_updates:
        chunks = sum(math.ceil(size / chunk_values("cuda")) for size in values)
        a_value = COMPILED_UPDATE_BYTES if config.optim.compile else STREAMED_UPDATE_BYTES
        launches = chunks + UPDATE_KERNELS if config.optim.compile else STREAMED_KERNELS * chunks
    return sum(values) * a_value / (on.gpu.bandwidth * GIGA * on.assumed.memory), launches


def _merges_a_step(config: RunConfig) -> float:
    if config.method != "loqt":
        return 0.0
    steps = config.train.steps
    return len(planned_merges(config.loqt.merge, steps)) / steps


def _merge_seconds(
    config: RunConfig, shapes: ModelShapes, one: OnePass, spread: Spread, passes: int, on: Machine
) -> float:
    """Of sketches, on every rank, and of what is shared out."""
    if config.method != "loqt":
        return 0.0
    assumed = on.assumed
    sketched, plain = (
        sum(_device_seconds(operations, on, config.model)) for operations in (one.merge_operations, one.operations)
    )
    shared, factorised = 0.0, 0.0
    rounds = min(config.loqt.merge.compensation_rounds, assumed.merge_rounds)
    for spec in shapes.layers:
        *_, features, width = probe_shape(spec.each, config.loqt.subspace)
        factorised += spec.expert_count * 4 * features * width**2 / (assumed.factorise * TERA)
        values = spec.base.rows * spec.base.cols
        products = (1 + 2 * rounds) * 2 * values * spec.projection.cols
        shared += products / (on.gpu.float32 * TERA * assumed.merge_products)
        shared += (1 + rounds) * values * assumed.merge_bytes / (on.gpu.bandwidth * GIGA * assumed.memory)
    return passes * max(0.0, sketched - plain) + (factorised + shared) / spread.ranks
