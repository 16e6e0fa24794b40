"""The merge on one device: against an independent float64 implementation, and free of the reference's known faults."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from loqt_scale import LoQTConfig, MergeConfig, MergeCoordinator, QuantizationConfig, SubspaceConfig, convert_to_loqt
from loqt_scale.config import SubspaceMethod
from loqt_scale.functional.projection import sign_direction
from loqt_scale.functional.quantization import MatrixLayout, pack, unpack
from loqt_scale.layers import LoQTLinear, loqt_layers
from loqt_scale.merge import coordinator as coordination

RANK, SCALE = 8, 0.5


class Small(nn.Module):
    """Linears of every kind: square, wide, tall, with and without bias, and one that stays in full precision."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 48)
        self.square = nn.Linear(48, 48, bias=False)
        self.up = nn.Linear(48, 86)
        self.down = nn.Linear(86, 48)
        self.lm_head = nn.Linear(48, 50, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = hidden + self.square(hidden)
        hidden = hidden + self.down(torch.tanh(self.up(hidden)))
        return self.lm_head(hidden)


class Dense:
    """The weights before conversion."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.weights[name][start:stop].clone()  # the caller's own


def config(method: SubspaceMethod = "svd", **merge: object) -> LoQTConfig:
    return LoQTConfig(
        rank=RANK,
        scale=SCALE,
        subspace=SubspaceConfig(method=method),
        merge=MergeConfig(gap=5, schedule="constant", **merge),  # type: ignore[arg-type]
    )


def make(settings: LoQTConfig, *, true_weights: bool = True) -> tuple[Small, MergeCoordinator, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Small()
    source = Dense(model) if true_weights else None
    convert_to_loqt(model, settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    merges = MergeCoordinator(model, optimizer, settings, total_steps=100, seed=3, initial_weights=source)
    return model, merges, optimizer


def batch(step: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 50, (4, 17), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], (tokens[:, :-1] * 7 + 3) % 50  # a rule that can be learnt


def loss_of(model: nn.Module, step: int) -> Tensor:
    inputs, targets = batch(step)
    return nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def train(model: nn.Module, merges: MergeCoordinator, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        merges.prepare(step)
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        merges.finish(step)
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("method", ["sketch", "svd"])
def test_factorising_in_the_backward_pass_changes_no_bit(method: SubspaceMethod) -> None:
    """In the last of two backward passes, so that the sketches of both count; and each is freed at once."""
    states = []
    for passes in (None, 2):
        model, merges, optimizer = make(config(method))
        for step in range(3):
            merges.prepare(step, backward_passes=passes)
            probes = [layer.probe for _, layer in loqt_layers(model)]
            for half in (0, 1):
                loss_of(model, 2 * step + half).backward()
            if merges.is_merge_step(step):
                held = [probe is not None and probe.leaf.grad is not None for probe in probes]
                assert held == [passes is None] * len(probes)
            optimizer.step()
            merges.finish(step)
            optimizer.zero_grad()
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_gradient_that_is_not_finite_is_left_for_the_trainer_to_judge() -> None:
    model, merges, optimizer = make(config("sketch"))
    merges.prepare(0, backward_passes=1)
    (loss_of(model, 0) * float("nan")).backward()
    merges.postpone(0)
    optimizer.zero_grad()
    assert merges.is_merge_step(1) and not merges.is_merge_step(0)
    merges.prepare(1, backward_passes=1)
    loss_of(model, 1).backward()
    report = merges.finish(1)
    assert report is not None and report.means()["gradient_energy"] > 0.0


class Counted(Dense):
    """Counts how often the true weights are read."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.read: list[str] = []

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        self.read.append(name)
        return super().rows(name, start, stop)


@pytest.mark.parametrize("gap", [1, 2, 5])
@pytest.mark.parametrize("resumed", [False, True])
def test_the_first_merge_reads_the_true_weights_whenever_it_comes(gap: int, resumed: bool) -> None:
    """Also if steps 0 and 1 were skipped, on whatever their merges fall, and if the run was resumed in between."""
    settings = LoQTConfig(rank=RANK, scale=SCALE, merge=MergeConfig(gap=gap, schedule="constant"))
    torch.manual_seed(0)
    model = Small()
    source = Counted(model)
    convert_to_loqt(model, settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def coordinator() -> MergeCoordinator:
        return MergeCoordinator(model, optimizer, settings, total_steps=100, seed=3, initial_weights=source)

    merges = coordinator()
    for step in (0, 1):
        merges.prepare(step)
        merges.postpone(step)
    assert merges.steps[:2] == [2, 2 + (gap if gap != 5 else 3)] and not source.read
    if resumed:
        merges = coordinator()
        merges.require(2)
    indices = []
    for step in range(2, 12):
        merges.prepare(step)
        loss_of(model, step).backward()
        report = merges.finish(step)
        optimizer.zero_grad()
        if report is not None:
            indices.append(report.index)
            assert len(source.read) == len(dict(loqt_layers(model))), step  # once, in the first
    assert indices == {1: list(range(2, 12)), 2: [1, 2, 3, 4, 5], 5: [0, 1, 2]}[gap]


@pytest.mark.parametrize("resumed", [False, True])
def test_a_postponed_merge_later_on_reads_them_no_more(resumed: bool) -> None:
    """The merge of the last step, too, may be postponed: to a step that comes if the run is extended."""
    model, merges, optimizer = make(config("sketch"))
    train(model, merges, optimizer, range(5))
    merges.prepare(5)
    merges.postpone(5)
    before = {name: layer.effective_weight() for name, layer in loqt_layers(model)}
    if resumed:
        source = Counted(Small())
        merges = MergeCoordinator(model, optimizer, config("sketch"), total_steps=100, initial_weights=source)
        merges.require(6)
    merges.prepare(6)
    loss_of(model, 6).backward()
    report = merges.finish(6)
    assert report is not None and report.index == 1 and report.means()["subspace_overlap"] >= 0.0
    assert not resumed or not source.read
    for name, layer in loqt_layers(model):
        assert (layer.effective_weight() - before[name]).norm() < 0.2 * before[name].norm()
    merges.prepare(merges.steps[-1])
    merges.postpone(last := merges.steps[-1])
    assert merges.steps[-1] == last + 1


# ---- a start that makes up for quantization ------------------------------------------------------------------------


def compensated(**merge: object) -> LoQTConfig:
    return dataclasses.replace(config("sketch", **merge), init="loftq")


def test_a_compensated_start_lies_nearer_to_the_weights_than_quantization() -> None:
    model, merges, _ = make(compensated())
    torch.manual_seed(0)
    weights = Dense(Small()).weights
    bare = {name: layer.base.dense(torch.float32) for name, layer in loqt_layers(model)}
    report = merges.begin()
    assert report is not None and set(report.errors) == set(bare)
    for name, layer in loqt_layers(model):
        weight = weights[f"{name}.weight"]
        before, after = ((weight - w).norm() / weight.norm() for w in (bare[name], layer.effective_weight()))
        assert (float(before), float(after)) == pytest.approx(report.errors[name], rel=1e-3)
        assert after < 0.9 * before


@pytest.mark.parametrize("resumed", [False, True])
def test_its_first_merge_starts_from_the_true_weights_and_what_was_learnt(resumed: bool) -> None:
    """Not from the quantized ones with what makes up for them, whose error would stay. Steps may be skipped first."""
    model, merges, optimizer = make(compensated())
    torch.manual_seed(0)
    source = Counted(Small())
    merges.begin()
    before = {name: layer.effective_weight() for name, layer in loqt_layers(model)}
    merges.prepare(0)
    merges.postpone(0)  # a step that was skipped
    if resumed:
        merges = MergeCoordinator(model, optimizer, compensated(), total_steps=100, seed=3, initial_weights=source)
        merges.require(1)
        merges.expect_first_merge()
    merges.prepare(1)
    loss_of(model, 1).backward()
    optimizer.step()
    learnt = {name: layer.effective_weight() - before[name] for name, layer in loqt_layers(model)}
    merged: dict[str, Tensor] = {}
    original = coordination.compensate

    def watched(weight: Tensor, *given: object, **more: object) -> object:
        merged[next(name for name, layer in loqt_layers(model) if name not in merged and same(layer, weight))] = (
            weight.clone()
        )
        return original(weight, *given, **more)  # type: ignore[arg-type]

    def same(layer: LoQTLinear, weight: Tensor) -> bool:
        return weight.shape == (layer.out_features, layer.in_features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coordination, "compensate", watched)
        report = merges.finish(1)
    assert report is not None and "update_survival" not in report.means() and "subspace_overlap" not in report.means()
    for name, weight in merged.items():
        expected = source.weights[f"{name}.weight"] + learnt[name]
        torch.testing.assert_close(weight, expected, rtol=0, atol=2e-6)
        assert learnt[name].norm() > 1e-3
    merges.prepare(5)
    loss_of(model, 5).backward()
    again = merges.finish(5)
    assert again is not None and again.means()["update_survival"] > 0.0
    assert len(source.read) == (len(merged) if resumed else 0)  # the second merge reads them no more


def test_a_compensated_start_needs_the_weights_and_changes_nothing_where_the_base_is_exact() -> None:
    _, merges, _ = make(compensated(), true_weights=False)
    with pytest.raises(ValueError, match="initial_weights"):
        merges.begin()
    exact = dataclasses.replace(compensated(), quantization=QuantizationConfig(weight="none"))
    model, merges, _ = make(exact)
    report = merges.begin()
    assert report is not None and report.means() == {}
    assert not any(layer.factor.any() or layer.projection.dense(torch.float32).any() for _, layer in loqt_layers(model))
    assert make(config())[1].begin() is None


# ---- the oracle ------------------------------------------------------------------------------------------------------


def round_trip(matrix: Tensor) -> Tensor:
    """Through NF4 and back, float64. The quantizer itself has its own oracle in test_quantization."""
    layout = MatrixLayout(*matrix.shape, "nf4")
    return unpack(*pack(matrix.float(), layout), layout, torch.float64)


def naive_merge(weight: Tensor, gradient: Tensor, side: str, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's merge of one dense merged weight, straight from its description: (P, dequantized W, B), float64."""
    left, _, right = torch.linalg.svd(gradient.double())
    exact = right[:RANK].T if side == "input" else left[:, :RANK]
    direction = sign_direction(exact.shape[0], exact.device).double()
    basis = round_trip(exact * (direction.T @ exact).sign())  # the sign rule
    best: tuple[float, Tensor, Tensor] | None = None
    low_rank = torch.zeros_like(weight)
    for _ in range(rounds):
        base = round_trip(weight - SCALE * low_rank)
        pinv = torch.linalg.pinv(basis)
        if side == "input":
            factor = (weight - base) @ pinv.T / SCALE
            low_rank = factor @ basis.T
        else:
            factor = ((pinv @ (weight - base)) / SCALE).T
            low_rank = basis @ factor.T
        error = float((weight - base - SCALE * low_rank).norm())
        if best is None or error < best[0]:
            best = (error, base, factor)
    assert best is not None
    return basis, best[1], best[2]


def dense_gradients(model: Small, step: int) -> dict[str, Tensor]:
    """Weight gradients of the LoQT layers' effective weights, by autograd on a dense twin of the model."""
    twin = Small()
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            ours = model.get_submodule(name)
            dense = ours.effective_weight() if isinstance(ours, LoQTLinear) else ours.weight
            module.weight.data.copy_(dense)  # type: ignore[arg-type]
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.data.copy_(ours.bias)  # type: ignore[arg-type]
    loss_of(twin, step).backward()
    gradients = {name: twin.get_submodule(name).weight.grad for name, _ in loqt_layers(model)}
    assert all(isinstance(g, Tensor) for g in gradients.values())
    return gradients  # type: ignore[return-value]


@pytest.mark.parametrize("first", [True, False])
def test_svd_merge_equals_the_naive_float64_algorithm(first: bool) -> None:
    """At step 0 the merged weight is the true initial one; later it is dequant(W_q) + s L(B), B after its own step."""
    model, merges, optimizer = make(config("svd"))
    step = 0 if first else 5
    torch.manual_seed(0)
    source = Dense(Small()) if first else None
    train(model, merges, optimizer, range(step))
    gradients = dense_gradients(model, step)
    merges.prepare(step)
    loss_of(model, step).backward()
    optimizer.step()
    merged = {
        name: (source.weights[f"{name}.weight"].double() if source else layer.effective_weight(torch.float64))
        for name, layer in loqt_layers(model)
    }
    report = merges.finish(step)
    assert report is not None
    for name, layer in loqt_layers(model):
        basis, base, factor = naive_merge(merged[name], gradients[name], layer.side, rounds=5)
        ours = layer.projection.dense(torch.float64)
        assert ((ours - basis).abs() > 1e-3).float().mean() < 0.02, name  # midpoints of codes may fall either way
        naive_effective = base + SCALE * (factor @ basis.T if layer.side == "input" else basis @ factor.T)
        error = (merged[name] - layer.effective_weight(torch.float64)).norm() / merged[name].norm()
        naive_error = (merged[name] - naive_effective).norm() / merged[name].norm()
        assert float(error) == pytest.approx(float(naive_error), rel=0.02), name
        assert report.layers[name]["error_after"] == pytest.approx(float(error), rel=1e-3)
        if first:
            moved = (layer.base.dense(torch.float64) - base).norm() / base.norm()
            assert moved < 0.03, name
            assert (layer.factor.double() - factor).norm() < 0.1 * factor.norm(), name


def test_randomized_keeps_the_exact_energy_even_of_flat_gradients() -> None:
    """These toy gradients are as flat as gradients get; tests/integration does it on a language model, sketches too."""
    for step in (0, 10):
        model, merges, optimizer = make(config("randomized"))
        train(model, merges, optimizer, range(step))
        gradients = dense_gradients(model, step)
        merges.prepare(step)
        loss_of(model, step).backward()
        optimizer.step()
        merges.finish(step)
        for name, layer in loqt_layers(model):
            gradient = gradients[name].double()
            basis = torch.linalg.qr(layer.projection.dense(torch.float64))[0]
            kept = (gradient @ basis if layer.side == "input" else basis.T @ gradient).square().sum()
            left, _, right = torch.linalg.svd(gradient)
            exact = round_trip(right[:RANK].T if layer.side == "input" else left[:, :RANK])
            exact = torch.linalg.qr(exact)[0]
            best = (gradient @ exact if layer.side == "input" else exact.T @ gradient).square().sum()
            assert kept >= 0.99 * best, (name, step, float(kept / best))


# ---- what a merge must do, and must not ------------------------------------------------------------------------------


def test_compensation_lowers_the_error_in_every_layer_of_every_merge() -> None:
    model, merges, optimizer = make(config("sketch"))
    for step in range(16):
        merges.prepare(step)
        loss_of(model, step).backward()
        optimizer.step()
        report = merges.finish(step)
        optimizer.zero_grad()
        if report is not None:
            for name, layer in report.layers.items():
                assert layer["error_after"] < 0.95 * layer["error_before"], (step, name)


@pytest.mark.parametrize("policy", ["keep", "reset", "transport"])
def test_it_learns_under_every_policy(policy: str) -> None:
    model, merges, optimizer = make(config("sketch", optimizer_state=policy))
    losses = train(model, merges, optimizer, range(60))
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


def test_merging_keeps_the_function_up_to_quantization() -> None:
    model, merges, optimizer = make(config("sketch"))
    train(model, merges, optimizer, range(5))
    merges.prepare(5)
    loss_of(model, 5).backward()
    optimizer.step()
    before = float(loss_of(model, 99))
    merges.finish(5)
    assert float(loss_of(model, 99)) == pytest.approx(before, rel=0.05)


def test_without_quantization_a_merge_changes_nothing_but_the_subspace() -> None:
    """LoQT-nq: W absorbs the update exactly."""
    plain = QuantizationConfig(weight="none", projection="none")
    settings = LoQTConfig(rank=RANK, quantization=plain, merge=MergeConfig(gap=5, schedule="constant"))
    model, merges, optimizer = make(settings)
    train(model, merges, optimizer, range(5))
    merges.prepare(5)
    loss_of(model, 5).backward()
    optimizer.step()
    before = {name: layer.effective_weight() for name, layer in loqt_layers(model)}
    report = merges.finish(5)
    for name, layer in loqt_layers(model):
        torch.testing.assert_close(layer.effective_weight(), before[name], rtol=1e-5, atol=1e-6)
    assert report is not None and report.means()["update_survival"] == pytest.approx(1.0, abs=1e-4)


def test_a_merge_uses_no_global_randomness() -> None:
    for method in ("sketch", "randomized", "svd"):
        model, merges, optimizer = make(config(method))  # type: ignore[arg-type]
        before = torch.get_rng_state()
        merges.prepare(0)
        loss_of(model, 0).backward()
        optimizer.step()
        merges.finish(0)
        assert torch.equal(torch.get_rng_state(), before), method


def test_biases_go_on_training_after_merges() -> None:
    model, merges, optimizer = make(config("sketch"))
    train(model, merges, optimizer, range(6))
    assert isinstance(model.up.bias, Tensor)
    before = model.up.bias.detach().clone()
    train(model, merges, optimizer, range(6, 8))
    assert not torch.equal(model.up.bias, before)


def test_evaluation_while_a_merge_is_pending_changes_nothing() -> None:
    """The reference's adapters stay off for good after it; ours must not even differ in the last bit."""
    runs = []
    for evaluating in (False, True):
        model, merges, optimizer = make(config("sketch"))
        for step in range(12):
            merges.prepare(step)
            loss = loss_of(model, step)
            if evaluating:
                model.eval()
                with torch.no_grad():
                    loss_of(model, 1000)
                model.train()
            loss.backward()
            optimizer.step()
            if evaluating:
                with torch.no_grad():
                    loss_of(model, 1000)
            merges.finish(step)
            optimizer.zero_grad()
        runs.append(torch.cat([p.detach().double().flatten() for p in model.parameters()]))
    assert torch.equal(*runs)


def test_probes_are_gone_and_nothing_dense_stays_after_a_merge() -> None:
    model, merges, optimizer = make(config("svd"))
    train(model, merges, optimizer, range(1))
    for _, layer in loqt_layers(model):
        assert layer.probe is None
        dense = layer.in_features * layer.out_features
        held = sum(v.numel() for v in vars(layer).values() if isinstance(v, Tensor))
        assert held < dense


def test_finish_without_prepare_says_what_to_do() -> None:
    _, merges, _ = make(config("sketch"))
    with pytest.raises(RuntimeError, match=r"call prepare\(step\) before the forward"):
        merges.finish(0)
    assert merges.finish(1) is None


def test_gradient_checkpointing_inside_a_merge_step() -> None:
    results = []
    for checkpointed in (False, True):
        model, merges, optimizer = make(config("sketch"))
        if checkpointed:
            inner = model.up.forward
            model.up.forward = lambda x, inner=inner: torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)  # type: ignore[method-assign]
        train(model, merges, optimizer, range(6))
        results.append(float(loss_of(model, 50)))
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_no_linear_matches() -> None:
    with pytest.raises(ValueError, match=r"loqt\.target_modules \['nope'\].*matches no linear.*square"):
        convert_to_loqt(Small(), LoQTConfig(rank=4, target_modules=["nope"]))


def test_names_choose_layers_and_tied_weights_are_left_alone() -> None:
    model = Small()
    model.lm_head.weight = model.embed.weight
    assert convert_to_loqt(model, LoQTConfig(rank=4, target_modules=["*"], exclude_modules=[])) == [
        "square",
        "up",
        "down",
    ]
    other = Small()
    assert convert_to_loqt(other, LoQTConfig(rank=4, target_modules=["up", "lm*"], exclude_modules=[])) == [
        "up",
        "lm_head",
    ]
    with pytest.raises(ValueError, match=r"loqt\.rank is 60, but square is 48 x 48; write 48 or less"):
        convert_to_loqt(Small(), LoQTConfig(rank=60))


@pytest.mark.parametrize("passes", [None, 1])
def test_a_merge_keeps_nothing_alive(passes: int | None) -> None:
    """Python's garbage collector does not see through the hooks of a tensor: they must be gone."""
    model, merges, optimizer = make(config("sketch"))
    merges.prepare(0, backward_passes=passes)
    loss_of(model, 0).backward()
    optimizer.step()
    merges.finish(0)
    there = weakref.ref(model)
    del model, merges, optimizer
    gc.collect()
    assert there() is None
