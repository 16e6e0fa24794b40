"""Subspaces: exactness of the oracle, energy kept by the cheap methods, invariance and determinism."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loqt_scale.functional import projection as P
from loqt_scale.functional.transport import basis_rotation

SHAPES = [(96, 64), (64, 96), (64, 64)]


def gradient_like(out_features: int, in_features: int, decay: float = 1.5, size: float = 1e-6) -> Tensor:
    """A matrix with a power-law spectrum, tiny as gradients are."""
    generator = torch.Generator().manual_seed(3)
    n = min(out_features, in_features)
    left = torch.linalg.qr(torch.randn(out_features, n, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(in_features, n, generator=generator))[0]
    return (left * torch.arange(1, n + 1).float().pow(-decay)) @ right.T * size


def sketched(gradient: Tensor, rank: int, side: str, oversampling: float = 1.0) -> tuple[Tensor, Tensor]:
    width = P.sketch_width(rank, *gradient.shape, oversampling)
    features = gradient.shape[0] if side == "input" else gradient.shape[1]
    omega = P.test_matrix(features, seed=5, device=torch.device("cpu"))
    sketch = P.times_test_matrix(gradient.T if side == "input" else gradient, omega, width)
    return sketch, P.sketch_basis(sketch, rank)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["input", "output"])
def test_svd_takes_the_right_side(shape: tuple[int, int], side: str) -> None:
    """The reference's eigh path takes rows for columns on one side; the best r-dimensional subspace is unmistakable."""
    gradient = gradient_like(*shape)
    basis = P.svd_basis(gradient, 8, side)
    assert basis.shape == (shape[1] if side == "input" else shape[0], 8)
    torch.testing.assert_close(basis.T @ basis, torch.eye(8), atol=1e-5, rtol=0)
    singular = torch.linalg.svdvals(gradient.double())
    best = singular[:8].square().sum() / singular.square().sum()
    torch.testing.assert_close(P.captured_energy(gradient, basis, side), best, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["input", "output"])
def test_cheap_methods_keep_the_energy(shape: tuple[int, int], side: str) -> None:
    gradient = gradient_like(*shape)
    best = P.captured_energy(gradient, P.svd_basis(gradient, 8, side), side)
    randomized = P.randomized_basis(gradient, 8, side, oversampling=1.0, power_iterations=2, seed=1)
    sketch, basis = sketched(gradient, 8, side)
    for candidate in (randomized, basis):
        torch.testing.assert_close(candidate.T @ candidate, torch.eye(8), atol=1e-5, rtol=0)
        assert P.captured_energy(gradient, candidate, side) >= 0.99 * best
    estimate = P.kept_of_sketch(sketch, basis).square().sum((-2, -1))
    assert abs(float(estimate) - float(P.captured_energy(gradient, basis, side))) < 0.02


@settings(max_examples=25, deadline=None)
@given(
    out_features=st.integers(2, 40),
    in_features=st.integers(2, 40),
    side=st.sampled_from(["input", "output"]),
    d=st.data(),
)
def test_a_gradient_of_the_right_rank_is_caught_whole(
    out_features: int, in_features: int, side: str, d: st.DataObject
) -> None:
    rank = d.draw(st.integers(1, min(out_features, in_features)))
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(out_features, rank, generator=generator)
    gradient = left @ torch.randn(rank, in_features, generator=generator)
    bases = [
        P.svd_basis(gradient, rank, side),
        P.randomized_basis(gradient, rank, side, oversampling=0.0, power_iterations=1, seed=0),
        sketched(gradient, rank, side)[1],
    ]
    for basis in bases:
        assert P.captured_energy(gradient, basis, side) > 0.9999


def from_sketch(oversampling: float) -> Callable[..., Tensor]:
    return lambda gradient, rank, side, **more: P.sketch_basis(
        sketched(gradient, rank, side, oversampling)[0], rank, **more
    )


METHODS: dict[str, Callable[..., Tensor]] = {
    "sketch": from_sketch(0.0),
    "wide sketch": from_sketch(1.0),
    "randomized": partial(P.randomized_basis, oversampling=1.0, power_iterations=2),
    "svd": P.svd_basis,
}


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("method", METHODS)
def test_columns_without_signal_are_not_decided_by_rounding(method: str, side: str) -> None:
    """A gradient of rank 5, summed in another order, and P of 16 columns: without a rule 11 of them are rounding's."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(n, 5, generator=generator) for n in (96, 64))
    weights = torch.rand(40, 5, generator=generator)
    parts = [(left * weight) @ right.T * 1e-6 for weight in weights]
    gradient, reordered = torch.stack(parts).sum(0), sum(parts[:20]) + sum(parts[20:])
    assert not torch.equal(gradient, reordered)
    basis = METHODS[method](gradient, 16, side, seed=1)
    again = METHODS[method](reordered, 16, side, seed=1)
    torch.testing.assert_close(again, basis, atol=2e-3, rtol=0)
    torch.testing.assert_close(basis.T @ basis, torch.eye(16), atol=1e-5, rtol=0)
    other = METHODS[method](gradient, 16, side, seed=2)  # explores elsewhere, with the same signal
    if method == "sketch":  # its columns are no singular vectors: the first five hold nearly all
        assert all(P.captured_energy(gradient, columns, side) > 0.9999 for columns in (basis, other))
        assert P.captured_energy(gradient, basis[:, :5], side) > 0.999
    else:
        assert P.captured_energy(gradient, basis[:, :5], side) > 0.99999
        torch.testing.assert_close(other[:, :5], basis[:, :5], atol=1e-3, rtol=0)
    assert P.subspace_overlap(basis_rotation(basis[:, 5:], other[:, 5:])) < 0.5


def test_the_background_leaves_a_strong_gradient_alone() -> None:
    gradient = gradient_like(96, 64)
    left, _, right = torch.linalg.svd(gradient.double())
    for side, exact in (("input", right.T[:, :8]), ("output", left[:, :8])):
        basis = P.svd_basis(gradient, 8, side, seed=3).double()
        assert (basis * exact).sum(0).abs().min() > 0.9999


@pytest.mark.parametrize("angle", [1e-2, 1e-4])
def test_signs_turn_no_more_often_than_any_rule_must(angle: float) -> None:
    """Columns that rounding has moved by an angle: t / pi of them turn, however flat or pointed they are."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(256, 40000, generator=generator)
    columns[:, ::2] = columns[:, ::2] ** 3  # few large entries
    columns = torch.nn.functional.normalize(columns, dim=0)
    noise = torch.nn.functional.normalize(torch.randn(columns.shape, generator=generator), dim=0)
    moved = torch.nn.functional.normalize(columns + angle * noise, dim=0)
    turned = ((P._signed(columns) * P._signed(moved)).sum(0) < 0).float().mean()
    assert turned < 1e-4 + angle / 2
    signs = (P._signed(columns) * columns).sum(0).sign()
    assert abs(float(signs.mean())) < 0.02  # both occur
    assert torch.equal(P._signed(-columns), P._signed(columns))


def test_sketches_add_up_over_ranks_and_micro_batches() -> None:
    parts = [gradient_like(64, 48) * weight for weight in (0.2, 0.5, 0.3)]
    omega = P.test_matrix(64, seed=9, device=torch.device("cpu"))
    together = P.times_test_matrix(torch.stack(parts).sum(0).T, omega, 24)
    apart = torch.stack([P.times_test_matrix(part.T, omega, 24) for part in parts]).sum(0)
    torch.testing.assert_close(P.sketch_basis(together, 8).abs(), P.sketch_basis(apart, 8).abs(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("used", [5, 12, 40])
def test_a_test_matrix_is_sparse_orthogonal_and_what_its_product_says(used: int) -> None:
    """Against the dense Omega, which the product with the identity shows; 40 columns are all that there are."""
    omega, width = P.test_matrix(40, seed=1, device=torch.device("cpu")), used + P.VALIDATION_COLUMNS
    dense = P.times_test_matrix(torch.eye(40), omega, width)
    assert torch.equal((dense[:, :used] != 0).sum(1), torch.ones(40, dtype=torch.int64))
    square = dense[:, :used].T @ dense[:, :used]
    assert torch.equal(square, square.diagonal().diag()) and bool((square.diagonal() > 0).all())
    matrix = torch.randn(7, 40, dtype=torch.float64)
    torch.testing.assert_close(P.times_test_matrix(matrix, omega.double(), width), matrix @ dense.double())


def test_no_global_randomness_and_same_seed_same_numbers() -> None:
    before = torch.get_rng_state()
    first = P.test_matrix(10, seed=4, device=torch.device("cpu"))
    P.randomized_basis(gradient_like(20, 10), 4, "input", oversampling=1.0, power_iterations=1, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, P.test_matrix(10, seed=4, device=torch.device("cpu")))
    assert not torch.equal(first, P.test_matrix(10, seed=5, device=torch.device("cpu")))


def test_a_zero_gradient_still_gives_a_basis() -> None:
    zero = torch.zeros(12, 10)
    for basis in (P.svd_basis(zero, 3, "input"), P.sketch_basis(torch.zeros(10, 20), 3)):
        torch.testing.assert_close(basis.T @ basis, torch.eye(3), atol=1e-5, rtol=0)


def test_overlap() -> None:
    basis = torch.linalg.qr(torch.randn(30, 6))[0]
    rotated = basis @ torch.linalg.qr(torch.randn(6, 6))[0]
    torch.testing.assert_close(P.subspace_overlap(basis_rotation(basis, rotated)), torch.tensor(1.0))
    other = torch.linalg.qr(torch.cat([basis, torch.randn(30, 6)], 1))[0][:, 6:]
    assert P.subspace_overlap(basis_rotation(basis, other)) < 1e-5


@pytest.mark.parametrize("side", ["input", "output"])
def test_overlap_by_energy_is_what_of_the_kept_gradient_lies_in_the_old_subspace(side: str) -> None:
    """Two gradients share three strong directions; all others are noise, which decides most columns of P."""
    generator = torch.Generator().manual_seed(0)
    strong = torch.randn(60, 3, generator=generator) @ torch.randn(3, 40, generator=generator)
    before, now = (strong + 0.3 * torch.randn(60, 40, generator=generator) for _ in range(2))
    old, new = P.svd_basis(before, 10, side), P.svd_basis(now, 10, side)
    kept = (now @ new if side == "input" else now.T @ new).T  # the gradient in the new P
    inside = (old.T.double() @ new.double() @ kept.double()).square().sum() / kept.double().square().sum()
    rotation = basis_rotation(old, new)
    assert float(P.energy_overlap(rotation, kept)) == pytest.approx(float(inside), abs=1e-5)
    assert inside > 0.9 and P.subspace_overlap(rotation) < 0.6
    torch.testing.assert_close(P.energy_overlap(rotation, torch.eye(10)), P.subspace_overlap(rotation))
    few = P.kept_of_gradient(now, new, side)
    assert float(P.energy_overlap(rotation, few)) == pytest.approx(float(inside), abs=0.05)
    assert float(few.square().sum()) == pytest.approx(float(P.captured_energy(now, new, side)), abs=0.05)
    omega = P.test_matrix(60 if side == "input" else 40, seed=1, device=torch.device("cpu"))
    for width in (10, 20):
        sketch = P.times_test_matrix(now.T if side == "input" else now, omega, width + P.VALIDATION_COLUMNS)
        basis = P.sketch_basis(sketch, 10)
        overlap = P.energy_overlap(basis_rotation(old, basis), P.kept_of_sketch(sketch, basis))
        assert float(overlap) == pytest.approx(float(inside), abs=0.08)


@pytest.mark.parametrize("size", [1.0, 1e-18])  # whose squares are 1e-36
def test_what_is_kept_does_not_depend_on_the_gradients_size(size: float) -> None:
    gradient = gradient_like(40, 60)
    basis = P.svd_basis(gradient, 6, "input")
    kept = P.kept_of_gradient(gradient * size, basis, "input")
    torch.testing.assert_close(kept, P.kept_of_gradient(gradient, basis, "input"))


def test_heavy_features_at_one_place_in_every_head_do_not_meet_in_one_bucket() -> None:
    """128 heavy rows of 1024, at 8 places in each of 16 heads, and r = 256: 0.44 of the energy where they meet."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.full((64,), 0.05)
    weights[:8] = 1.0
    gradient = torch.randn(1024, 1024, generator=generator) * weights.repeat(16).unsqueeze(1)
    basis = sketched(gradient, 256, "input", 0.0)[1]
    assert P.captured_energy(gradient, basis, "input") > 0.7


def test_columns_that_fill_the_space_are_orthonormal_too() -> None:
    """By a Gram matrix they would be off by 1e-2: the least singular value of 512 random columns is small."""
    left, _, right = torch.linalg.svd(torch.randn(512, 512, generator=torch.Generator().manual_seed(0)))
    basis = P.orthonormal_basis((left * torch.logspace(0, -9, 512)) @ right)
    torch.testing.assert_close(basis.T @ basis, torch.eye(512), atol=1e-5, rtol=0)
    assert torch.equal(basis, P._signed(basis)), "columns have no sign of their own"


@pytest.mark.parametrize("rank", [32, 48])
def test_two_orders_of_summing_give_nearly_one_basis(rank: int) -> None:
    """Singular values from 1 to 1e-6, sums in float32; with a background of 1e-4 columns turn five times as far."""
    generator = torch.Generator().manual_seed(0)
    strengths = torch.logspace(0, -6, 64)
    left, right = (torch.randn(n, 64, generator=generator) for n in (128, rank))
    parts = [(left * strengths * weight) @ right.T for weight in torch.rand(400, 64, generator=generator)]
    basis, again = map(P.orthonormal_basis, (torch.stack(parts).sum(0), sum(parts[:200]) + sum(parts[200:])))
    assert 0.0 < float((basis - again).norm(dim=0).max()) < 8e-5


@pytest.mark.parametrize(("features", "rank"), [(64, 8), (64, 32), (64, 33), (64, 64), (40, 1)])
@pytest.mark.parametrize("signal", [0, 1, 5, 64])
def test_a_sketch_as_wide_as_the_rank_gives_its_range_and_the_background(features: int, rank: int, signal: int) -> None:
    """Whatever part of it is signal, singular values over six orders; in columns that hold it, the oracle's space."""
    generator = torch.Generator().manual_seed(rank)
    strengths = torch.logspace(0, -6, signal or 1).double()
    left = torch.randn(features, len(strengths), generator=generator, dtype=torch.float64)
    right = torch.randn(len(strengths), rank, generator=generator, dtype=torch.float64)
    sketch = ((left * strengths) @ right * (signal > 0)).float()
    basis = P.orthonormal_basis(sketch)
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank), atol=1e-5, rtol=0)
    strong = torch.linalg.svd(sketch.double(), full_matrices=False)
    vectors = strong.U[:, 1e-2 * strong.S[0] < strong.S] if signal else strong.U[:, :0]
    kept = (basis.double().T @ vectors).square().sum(0)
    torch.testing.assert_close(kept, torch.ones_like(kept), atol=0.02, rtol=0)


@pytest.mark.parametrize(("count", "rows", "rank"), [(5, 48, 8), (2, 100, 16)])
def test_sketches_in_a_batch_give_the_bits_of_each_alone(count: int, rows: int, rank: int) -> None:
    """One of them a thousand times larger, one of rank 3 and one of zeros: none may disturb the others."""
    generator = torch.Generator().manual_seed(0)
    sketches = torch.randn(count, rows, 2 * rank + P.VALIDATION_COLUMNS, generator=generator)
    sketches[0] *= 1000.0
    sketches[-1] = 0.0
    if count > 3:
        sketches[1] = sketches[1, :, :3] @ sketches[1, :3]
    bases = P.sketch_basis(sketches, rank)
    energies = P.kept_of_sketch(sketches, bases).square().sum((-2, -1))
    for sketch, basis, energy in zip(sketches, bases, energies, strict=True):
        alone = P.sketch_basis(sketch, rank)
        assert torch.equal(basis, alone)
        torch.testing.assert_close(energy, P.kept_of_sketch(sketch, alone).square().sum((-2, -1)))
