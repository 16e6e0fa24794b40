"""What the rank processes measure: bytes they hold, bytes they allocate in passing, bytes they send.

All three are read off what is really there: storages of live tensors, the allocator's own log, the collectives.
"""

from __future__ import annotations

import gc
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from loqt_scale.checkpoint.state import MOMENTS, read_state, write_state
from loqt_scale.config import RunConfig
from loqt_scale.data import build_corpus
from loqt_scale.functional import compensation
from loqt_scale.metrics import MetricsWriter, Progress
from loqt_scale.metrics.wire_counter import WireCounter
from loqt_scale.model import weights
from loqt_scale.model.build import build_model, design_model
from loqt_scale.model.weights import WeightSource
from loqt_scale.optim import Moment
from loqt_scale.strategies import create_strategy
from loqt_scale.strategies.zero.flat import masters
from loqt_scale.strategies.zero.strategy import ZeroStrategy
from loqt_scale.training.trainer import Trainer
from tests.distributed.instruments import Allocations, HostReads, allocations
from tests.distributed.tasks import small_config

CPU = torch.device("cpu")
# kinds of memory, by the last parts of a parameter's name; what matches none is "full_precision"
KINDS = {
    "base.codes": "codes",
    "base.scales": "scales",
    "projection.codes": "projection",
    "projection.scales": "projection",
    "factor": "factor",
}


def make_trainer(
    config: RunConfig, device: torch.device = CPU, weights: Callable[[WeightSource], WeightSource] = lambda own: own
) -> Trainer:
    """The product's trainer on this rank, with nowhere to write to. Every rank.

    Args:
        config: The run.
        device: Where it computes.
        weights: Another source of initial weights, made from the run's own.
    """
    corpus = build_corpus(config.data, seed=config.train.seed, global_batch_size=config.train.global_batch_size)
    design = design_model(config, vocab_size=corpus.tokenizer.vocab_size)
    design = replace(design, weights=weights(design.weights))
    strategy = create_strategy(config, device=device)
    progress = Progress(config.train.steps, enabled=False, mode="off")
    writer = MetricsWriter(config.train.run_dir, enabled=False)
    return Trainer(config, corpus, design, strategy=strategy, progress=progress, writer=writer)


def parameter_kind(name: str) -> str:
    """codes, scales, projection, factor or full_precision."""
    return next((kind for suffix, kind in KINDS.items() if name.endswith(suffix)), "full_precision")


def update_without_merge(trainer: Trainer, step: int) -> None:
    """The step up to its merge, which the caller runs under its own instruments. Every rank."""
    if trainer.merges is not None:
        trainer.merges.prepare(step, backward_passes=trainer.micro_steps)
    trainer.accumulate(step)
    trainer.update()


# ---- what is held ------------------------------------------------------------------------------------------------


def live_tensor_bytes() -> int:
    """Bytes of all distinct CPU storages that Python can reach in this process."""
    gc.collect()
    sizes: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def moment_tensors(moment: Tensor | Moment) -> list[Tensor]:
    """What a moment is kept in."""
    return moment.tensors() if isinstance(moment, Moment) else [moment]


def kinds_held(trainer: Trainer) -> dict[str, int]:
    """Bytes per kind behind the model's parameters, their gradients and their Adam moments on this rank."""
    if isinstance(trainer.strategy, ZeroStrategy):
        return zero_kinds_held(trainer)
    held: dict[str, dict[int, int]] = defaultdict(dict)  # kind -> storages: FSDP2's gradients share one a block

    def add(kind: str, tensor: Tensor) -> None:
        storage = trainer.strategy.placement.local(tensor.detach()).untyped_storage()
        held[kind][storage.data_ptr()] = storage.nbytes()

    for name, parameter in trainer.built.model.named_parameters():
        add(parameter_kind(name), parameter)
        if parameter.grad is not None:
            add("gradients", parameter.grad)
        state = trainer.optimizer.state.get(parameter, {})
        for key in ("exp_avg", "exp_avg_sq"):
            for tensor in moment_tensors(state[key]) if key in state else ():
                add("adam", tensor)
    return {kind: sum(storages.values()) for kind, storages in held.items()}


def zero_kinds_held(trainer: Trainer) -> Counter[str]:
    """`kinds_held` inside a DeepSpeed engine, where tensors are views of flat buffers; and `masters`, kept in float32.

    Gradients are not seen here: DeepSpeed keeps them where it likes.
    """
    held: Counter[str] = Counter()
    for name, parameter in trainer.built.model.named_parameters():
        held[parameter_kind(name)] += getattr(parameter, "ds_tensor", parameter).nbytes
    assert isinstance(trainer.strategy, ZeroStrategy)
    held["masters"] = sum(flat.nbytes for flat in masters(trainer.model, trainer.strategy.engine.stage))
    for state in trainer.optimizer.state.values():
        moments = [state[key] for key in ("exp_avg", "exp_avg_sq") if key in state]
        held["adam"] += sum(tensor.nbytes for moment in moments for tensor in moment_tensors(moment))
    return held


def one_row_each(trainer: Trainer) -> dict[str, int]:
    """Bytes per kind of one row (of packed tensors: one row group) of every tensor: what padding may cost."""
    rows: Counter[str] = Counter()
    for name, parameter in trainer.built.model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        row = parameter.itemsize * math.prod(shape[1:])
        rows[parameter_kind(name)] += row
        if parameter.requires_grad:
            rows["gradients"] += row
            rows["adam"] += 2 * row
    return dict(rows)


def held_bytes(**settings: Any) -> dict[str, Any]:
    """Trains past the second merge, and measures.

    Returns:
        held, rows: Bytes per kind.
        live: Those of all new tensors.
        start: Collectives that have built the run.
        filled: Under ZeRO those of `fill_again`.
    """
    before = live_tensor_bytes()
    with WireCounter() as start:
        trainer = make_trainer(small_config(settings))
    last = trainer.merges.steps[1] if trainer.merges is not None else 2
    for step in range(last + 1):
        trainer.step(step)
    rows, held = one_row_each(trainer), kinds_held(trainer)
    live = live_tensor_bytes() - before
    trainer.accumulate(last + 1)
    if isinstance(trainer.strategy, ZeroStrategy):
        held["gradients"] = live_tensor_bytes() - before - live
        filled = fill_again(trainer)
    else:
        held["gradients"], filled = kinds_held(trainer).get("gradients", 0), []
    trainer.strategy.close()
    return {"held": dict(held), "rows": rows, "live": live, "start": _sent(start), "filled": filled}


@torch.no_grad()
def fill_again(trainer: Trainer) -> Sent:
    """Puts zeros, then the old values into all tensors of a run, as a loaded checkpoint does; its collectives.

    Every rank. All values are back, to the bit.
    """
    model, optimizer, editing = trainer.built.model, trainer.optimizer, trainer.strategy.editing
    before, shares = read_state(model, optimizer, editing), {}
    for name, parameter in model.named_parameters():
        rows = slice(*editing.rows_to_fill(parameter))
        for key in (f"model.{name}", *(f"moments.{name}.{moment}" for moment in MOMENTS)):
            if key in before:
                shares[key] = before[key].full_tensor()[rows]
        editing.clear(parameter)
        if parameter.requires_grad:
            editing.edit_moments(optimizer, parameter, lambda _, states: [state.zero_() for _, state in states])
    assert not any(share.to_local().any() for share in read_state(model, optimizer, editing).values())
    with WireCounter() as counter:
        write_state(shares, model, optimizer, editing)
    after = read_state(model, optimizer, editing)
    assert all(torch.equal(after[key].to_local(), before[key].to_local()) for key in before)
    return _sent(counter)


# ---- what is allocated in passing --------------------------------------------------------------------------------


@contextmanager
def small_chunks(values: int) -> Iterator[None]:
    """Streams in chunks of `values` values, so that chunks are small next to a shard."""
    with (
        mock.patch.object(compensation, "CHUNK_VALUES", values),
        mock.patch.object(weights, "CHUNK_ELEMENTS", values),
    ):
        yield


def transient_bytes(*, chunk_values: int, **settings: Any) -> dict[str, Allocations]:
    """Allocations of `build` (a second model), `first_merge` (weights are read again) and `merge` (a later one)."""
    config = small_config(settings)
    result = {}
    with small_chunks(chunk_values):
        trainer = make_trainer(config)
        vocab_size = trainer.corpus.tokenizer.vocab_size
        with allocations() as result["build"]:
            built = build_model(design_model(config, vocab_size=vocab_size), config.model, trainer.strategy)
        del built
        assert trainer.merges is not None
        for name, step in zip(("first_merge", "merge"), trainer.merges.steps, strict=False):
            update_without_merge(trainer, step)
            with allocations() as result[name]:
                trainer.merges.finish(step)
    return result


def peak_bytes(**settings: Any) -> dict[str, int]:
    """Most bytes of tensors alive at any moment of a normal `step` and of a `merge` step. Every rank."""
    return measured_peaks(small_config(settings))


def measured_peaks(config: RunConfig) -> dict[str, int]:
    """`peak_bytes` of a run; the lower of two measurements, since gloo's thread now and then still holds a message."""
    before = live_tensor_bytes()
    trainer = make_trainer(config)
    trainer.step(0)
    peaks = {}
    merge_steps = trainer.merges.steps[1:3] if trainer.merges is not None else []
    for name, steps in (("step", [1, 2]), ("merge", merge_steps)):
        for step in steps:
            alive = live_tensor_bytes() - before
            with allocations() as made:
                trainer.step(step)
            peaks[name] = min(peaks.get(name, sys.maxsize), alive + made.kept + made.passing)
    return peaks


def device_peaks(
    config: RunConfig,
    device: torch.device,
    weights: Callable[[WeightSource], WeightSource] = lambda own: own,
    *,
    first_merge: bool = False,
    say: Callable[[str], object] = lambda stage: None,
) -> dict[str, int]:
    """`measured_peaks` on CUDA as its caching allocator counts; and the most that it `reserved` over both steps.

    Args:
        config: The run.
        device: CUDA.
        weights: See `make_trainer`.
        first_merge: The merge is that of step 0; else a later one, of which there is more to carry over.
        say: Told when something has been done.
    """
    gc.collect()
    warm_up(device)
    before = torch.cuda.memory_allocated(device)
    trainer = make_trainer(config, device, weights)
    say("built")
    merge_step = trainer.merges.steps[0 if first_merge else 1] if trainer.merges is not None else None
    if not first_merge or merge_step is None:
        trainer.step(0)
        trainer.finish_pending()
    torch.cuda.empty_cache()
    peaks = {"reserved": 0}
    order = [("step", 1), ("merge", merge_step)]
    for name, step in reversed(order) if first_merge else order:
        if step is not None:
            torch.cuda.reset_peak_memory_stats(device)
            trainer.step(step)
            trainer.finish_pending()
            say(f"{name} done")
            peaks[name] = torch.cuda.max_memory_allocated(device) - before
            peaks["reserved"] = max(peaks["reserved"], torch.cuda.max_memory_reserved(device))
    trainer.strategy.close()
    return peaks


def warm_up(device: torch.device) -> None:
    """Has the device's libraries take their workspaces, which no run of ours is to blame for: of both threads.

    Autograd's thread has a cuBLAS handle of its own, and each handle its workspace, from torch's allocator, for good.
    """
    for dtype in (torch.float32, torch.bfloat16):
        one = torch.zeros(64, 64, device=device, dtype=dtype, requires_grad=True)
        torch.addmm(one, one, one).sum().backward()


# ---- what is sent ------------------------------------------------------------------------------------------------

Sent = list[tuple[str, int, str]]  # (kind, payload bytes, dtype)


def _sent(counter: WireCounter) -> Sent:
    return [(m.kind, m.payload_bytes, str(m.dtype).removeprefix("torch.")) for m in counter.messages]


def backend_collectives(profiler: profile) -> Counter[str]:
    """What gloo itself ran, by kind: a witness of the counter that does not pass through the dispatcher."""
    names = [event.name for event in profiler.events() or () if event.name.startswith("gloo:")]
    return Counter(name.removeprefix("gloo:") for name in names)


def traffic(**settings: Any) -> dict[str, Any]:
    """Collectives of a normal `step` and of a `merge`, and gloo's own count of them. Every rank."""
    trainer = make_trainer(small_config(settings))
    trainer.step(0)  # the first optimizer step and FSDP2's first pass do a little more
    result: dict[str, Any] = {"micro_steps": trainer.micro_steps}
    with profile(activities=[ProfilerActivity.CPU]) as profiler, WireCounter() as counter:
        trainer.step(1)
    result |= {"step": _sent(counter), "step_backend": backend_collectives(profiler), "step_sent": counter.sent_bytes()}
    result["step_between"] = counter.sent_bytes(node_size=trainer.config.parallel.shard_size)
    if trainer.merges is not None:
        step = trainer.merges.steps[1]
        with profile(activities=[ProfilerActivity.CPU]) as early_profiler, WireCounter() as early:
            update_without_merge(trainer, step)
        with profile(activities=[ProfilerActivity.CPU]) as profiler, WireCounter() as counter:
            report = trainer.merges.finish(step)
        early.messages = [message for message in early.messages if message.kind == "reduce"]  # else as any step
        assert report is not None and report.sketch_bytes == early.payload_bytes()
        reduces = backend_collectives(early_profiler)["reduce"]
        result |= {"merge": _sent(early) + _sent(counter), "merge_sent": early.sent_bytes() + counter.sent_bytes()}
        nodes = {"node_size": trainer.config.parallel.shard_size}
        result["merge_between"] = early.sent_bytes(**nodes) + counter.sent_bytes(**nodes)
        result["merge_backend"] = backend_collectives(profiler) + Counter(reduce=reduces)
    result["parameters"] = [
        {
            "name": name,
            "shape": tuple(p.shape),
            "itemsize": p.itemsize,
            "floating": p.dtype.is_floating_point,
            "trains": p.requires_grad,
        }
        for name, p in trainer.built.model.named_parameters()
    ]
    return result


# ---- what makes the host wait ----------------------------------------------------------------------------------------


def numbers_read_by_the_host(**settings: Any) -> list[str]:
    """Where normal steps and the settling of their forerunners read a tensor's value into Python. Every rank."""
    trainer = make_trainer(small_config(settings))
    try:
        for step in range(3):
            trainer.step(step)
        with HostReads() as reads:
            for step in range(3, 6):
                trainer.step(step)
        return reads.places
    finally:
        trainer.strategy.close()
