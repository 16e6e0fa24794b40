"""Merges and whole runs on CUDA, against the same on the CPU; and what only a device can show: that nobody waits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from loqt_scale import LoQTConfig, MergeConfig, MergeCoordinator, SubspaceConfig, convert_to_loqt
from loqt_scale.config import RunConfig
from loqt_scale.layers import LoQTLinear, loqt_layers
from loqt_scale.plan import plan_run
from loqt_scale.strategies import single_process
from loqt_scale.training.trainer import Trainer
from tests.cuda.conftest import Settings
from tests.cuda.test_kernels import random, relative
from tests.distributed.footprint_tasks import device_peaks, make_trainer
from tests.distributed.instruments import HostReads
from tests.distributed.pool import RankPool

CPU = torch.device("cpu")
EXACT_BASES = {"loqt.subspace.method": "svd"}  # sketches draw their test matrices on the device: other numbers
OFFLOAD = ["none", "base", "optimizer", "all"]
FRUGAL = {"optim.states": "int8", "loqt.rank": 32, "model.trained_dtype": "bfloat16", "model.dtype": "bfloat16"}
MASKED = {"data.mask_documents": True, "data.seq_len": 256, "train.micro_batch_size": 4}
PER_LAYER = {**FRUGAL, "optim.per_layer": True, "optim.clip_norm": 0}


def losses(config: RunConfig, device: torch.device, steps: int) -> list[float]:
    """Training losses of a run's first steps."""
    trainer, found = make_trainer(config, device), []
    judge = trainer.health.judge

    def listen(done: int, loss: float, norm: float) -> str | None:
        found.append(loss)
        return judge(done, loss, norm)

    trainer.health.judge = listen
    try:
        for step in range(steps):
            trainer.step(step)
        trainer.finish_pending()
        return found
    finally:
        trainer.strategy.close()


# ---- merges ------------------------------------------------------------------------------------------------------


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 256), nn.Tanh(), nn.Linear(256, 96, bias=False))


def merged(model: nn.Module, config: LoQTConfig, device: torch.device) -> tuple[nn.Module, list[dict[str, float]]]:
    """The model after two merges on a device, and what they said of each layer."""
    model = copy.deepcopy(model).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    merges = MergeCoordinator(model, optimizer, config, total_steps=20, editing=single_process(device).editing, seed=3)
    said: list[dict[str, float]] = []
    for step in range(3):
        merges.prepare(step, backward_passes=1)
        x = random(64, 96, seed=step).to(device)
        (model(x) - x.roll(1, dims=1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        report = merges.finish(step)
        said += [] if report is None else list(report.layers.values())
    return model, said


@pytest.mark.parametrize("scheme", ["nf4", "nf4_double", "none"])
def test_merges_are_those_of_the_cpu(device: torch.device, scheme: str) -> None:
    """The same bases up to flipped codes, the same errors, effective weights closer than quantizing leaves them."""
    config = LoQTConfig(rank=16, merge=MergeConfig(gap=2, schedule="constant"), subspace=SubspaceConfig(method="svd"))
    config = with_schemes(config, scheme)
    start = small_model()
    convert_to_loqt(start, config)
    (ours, expected), (theirs, found) = (merged(start, config, where) for where in (CPU, device))
    assert len(found) == len(expected) == 2 * 2
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=2e-2, abs=1e-5, nan_ok=True)
    for (name, layer), (_, twin) in zip(loqt_layers(theirs), loqt_layers(ours), strict=True):
        assert relative(layer.effective_weight(), twin.effective_weight()) < 2e-2, name
        assert all(p.device == device for p in layer.parameters())


def with_schemes(config: LoQTConfig, scheme: str) -> LoQTConfig:
    """W and P under one scheme."""
    return replace(config, quantization=replace(config.quantization, weight=scheme, projection=scheme))


@pytest.mark.parametrize("method", ["sketch", "randomized"])
def test_approximate_bases_keep_the_energy(device: torch.device, method: str) -> None:
    start, energies = small_model(), []
    config = LoQTConfig(rank=32, merge=MergeConfig(gap=2, schedule="constant"))
    convert_to_loqt(start, config)
    for name in (method, "svd"):
        _, said = merged(start, replace(config, subspace=SubspaceConfig(method=name)), device)
        assert all(layer["error_after"] < layer["error_before"] for layer in said[2:])  # before there is no error
        energies.append([layer["gradient_energy"] for layer in said])
    # eight validation columns estimate a sketch's energy to about a fifth of what is missing
    assert energies[0][:2] == pytest.approx(energies[1][:2], abs=0.1)


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [{}, {"model.dtype": "bfloat16"}, FRUGAL, MASKED, {"model.dtype": "bfloat16", **MASKED}],
    ids=["float32", "bfloat16", "frugal", "masked", "masked bfloat16"],
)
def test_losses_are_those_of_the_cpu(settings: Settings, device: torch.device, changed: dict[str, object]) -> None:
    """Steps 0 to 15, with merges after 0 and 13; then a flipped code of NF4 may tell (see test_equivalence)."""
    config = settings(**EXACT_BASES, **changed)
    expected, found = losses(config, CPU, 16), losses(config, device, 16)
    assert expected[-1] < expected[0] - 0.3, "the reference must have learnt something"
    before, after = (1e-3, 1e-2) if "model.dtype" not in changed else (1e-2, 3e-2)
    assert found[:1] == pytest.approx(expected[:1], rel=before)
    assert found == pytest.approx(expected, rel=after)


@pytest.mark.parametrize(
    "changed",
    [{}, {"model.dtype": "bfloat16"}, {"method": "full"}, {"model.activation_checkpointing": True}, PER_LAYER, MASKED],
    ids=["float32", "bfloat16", "full", "recomputed", "per layer", "masked"],
)
def test_a_step_does_not_wait_for_the_device(
    settings: Settings, device: torch.device, changed: dict[str, object]
) -> None:
    """As test_footprint's twin of the same name, but CUDA itself objects; copies from the host are seen, too."""
    trainer = make_trainer(settings(**{"loqt.merge.gap": 50, **changed}), device)
    for step in range(3):
        trainer.step(step)
    with nobody_waits(device):
        for step in range(3, 6):
            trainer.step(step)


@contextmanager
def nobody_waits(device: torch.device) -> Iterator[None]:
    """Raises where the host would wait for the device: on CUDA at once, elsewhere (see HostReads) at the end."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with HostReads() as reads:
        yield
    # the streamed AdamW keeps its count on the host
    places = [place for place in reads.places if 'int(state["step"])' not in place]
    assert not places, places[0]


@pytest.mark.parametrize(
    ("dtype", "more"), [("float32", {}), ("bfloat16", {}), ("bfloat16", MASKED)], ids=["float32", "bfloat16", "masked"]
)
def test_compiled_blocks_have_no_graph_break_and_the_same_losses(
    settings: Settings, device: torch.device, dtype: str, more: dict[str, object]
) -> None:
    plain = losses(settings(**{"model.dtype": dtype, **more}), device, 4)
    torch._dynamo.reset()
    counters.clear()
    compiled = losses(settings(**{"model.dtype": dtype, "model.compile": True, **more}), device, 4)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"], counters["graph_break"]
    assert compiled == pytest.approx(plain, rel=1e-3 if dtype == "float32" else 2e-2)


# ---- host memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", OFFLOAD[1:])
def test_offloading_keeps_the_losses(settings: Settings, device: torch.device, what: str) -> None:
    """`base` to the bit; where the host's cores update, their products round otherwise than the device's."""
    expected = losses(settings(), device, 16)
    found = losses(settings(**{"parallel.offload": what}), device, 16)
    assert found == (expected if what == "base" else pytest.approx(expected, rel=1e-2))


@pytest.mark.parametrize("what", OFFLOAD)
def test_a_gradient_that_is_not_finite_changes_nothing(settings: Settings, device: torch.device, what: str) -> None:
    """The verdict must have reached whoever updates: the device, or the host."""
    trainer = make_trainer(settings(**{"parallel.offload": what, "loqt.merge.gap": 50}), device)
    try:
        for step in range(2):
            trainer.step(step)
        norm = trainer.strategy.placement.local(trainer.built.model.get_parameter("model.norm.weight").detach())
        norm[0] = float("nan")
        before = factors(trainer)
        trainer.step(2)
        trainer.finish_pending()
        assert trainer.health.skipped == 1
        assert all(torch.equal(old, new) for old, new in zip(before, factors(trainer), strict=True))
    finally:
        trainer.strategy.close()


def factors(trainer: Trainer) -> list[torch.Tensor]:
    """Copies of all B, on the host."""
    layers: list[LoQTLinear] = [layer for _, layer in loqt_layers(trainer.built.model)]
    return [trainer.strategy.placement.local(layer.factor.detach()).to("cpu", copy=True) for layer in layers]


# ---- memory --------------------------------------------------------------------------------------------------------

# large enough for the device's own buffers (a cuBLAS workspace is 32 MiB) to be little beside it
LARGE = {
    "model.overrides": {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 4},
    "data.seq_len": 256,
    "loqt.rank": 256,
    "loqt.merge.gap": 2,
    "train.global_batch_size": 16,
    "train.micro_batch_size": 16,
}
SMALL = {"model.overrides": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4}, "loqt.merge.gap": 2}


@pytest.mark.parametrize("changed", [{}, {"model.dtype": "bfloat16"}, {"method": "full"}, PER_LAYER])
def test_peaks_are_what_plan_says(
    settings: Settings, device: torch.device, ranks: RankPool, changed: dict[str, object]
) -> None:
    size = LARGE if device.type == "cuda" else SMALL
    config = settings(**{**size, **changed, "loqt.rank": 256 if size is LARGE else 32})
    memory = plan_run(config, ranks=1, vocab_size=320).memory
    if device.type == "cuda":
        peaks = device_peaks(config, device)
    else:  # a process without what other tests have left
        peaks = ranks.run(1, "tests.distributed.footprint_tasks:measured_peaks", config=config)[0]
    expected = {"step": memory.step_peak} | ({"merge": memory.merge_peak} if config.method == "loqt" else {})
    assert {name: peaks[name] for name in expected} == pytest.approx(expected, rel=0.10)
