"""Compensation and state transport against naive float64 versions, and cut into shards against uncut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loqt_scale.functional import compensation as C
from loqt_scale.functional import survival
from loqt_scale.functional.quantization import MatrixLayout, pack, unpack
from loqt_scale.functional.transport import apply_state_policy, basis_rotation
from tests.unit.shards import Shards, assert_uncut


def problem(rows: int, cols: int, rank: int, side: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    features = cols if side == "input" else rows
    basis = torch.linalg.qr(torch.randn(features, rank, generator=generator))[0]
    layout = MatrixLayout(features, rank, "nf4")
    return weight, unpack(*pack(basis, layout), layout, torch.float32)  # as a layer holds it: not quite orthonormal


def settled(errors: list[float]) -> bool:
    """Whether the next round, after those of these errors, may be expected to gain less than `SETTLED`."""
    gains = [1 - error / min(errors[:index]) for index, error in enumerate(errors) if index]
    if len(gains) < 2:
        return bool(gains) and gains[0] < C.SETTLED
    if gains[-1] <= 0:
        return True
    return gains[-1] * (min(1.0, gains[-1] / gains[-2]) if gains[-2] > 0 else 1.0) < C.SETTLED


def naive(weight: Tensor, basis: Tensor, side: str, scale: float, rounds: int) -> tuple[Tensor, Tensor, list[float]]:
    """Dense, in float64, with torch's own pseudo-inverse: (W_q, B, errors of all rounds)."""
    layout = MatrixLayout(*weight.shape, "nf4")
    weight64, basis64 = weight.double(), basis.double()
    pinv = torch.linalg.pinv(basis64)

    def quantize(value: Tensor) -> Tensor:
        return unpack(*pack(value.float(), layout), layout, torch.float64)

    def low_rank(factor: Tensor) -> Tensor:
        return factor @ basis64.T if side == "input" else basis64 @ factor.T

    factor = torch.zeros(weight.shape[0] if side == "input" else weight.shape[1], basis.shape[1], dtype=torch.float64)
    candidates, errors, before = [(quantize(weight64), factor)], [], factor
    for _ in range(rounds):
        errors = [float((weight64 - q - scale * low_rank(b)).norm() / weight64.norm()) for q, b in candidates]
        if settled(errors):
            break
        base = quantize(weight64 - scale * low_rank(factor + C.BEYOND * (factor - before)))
        residual, before = weight64 - base, factor
        factor = (residual @ pinv.T if side == "input" else residual.T @ pinv.T) / scale
        candidates.append((base, factor))
    errors = [float((weight64 - q - scale * low_rank(b)).norm() / weight64.norm()) for q, b in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)
    return *candidates[best], errors


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("shape", [(64, 128), (96, 86), (50, 64)])
@pytest.mark.parametrize("rounds", [0, 1, 5])
def test_equals_the_naive_algorithm(shape: tuple[int, int], side: str, rounds: int) -> None:
    weight, basis = problem(*shape, 8, side)
    layout = MatrixLayout(*shape, "nf4")
    result = C.compensate(weight, layout, basis, basis.T @ basis, side=side, scale=0.5, rounds=rounds)
    base, factor, errors = naive(weight, basis, side, 0.5, rounds)
    assert float(result.error_before) == pytest.approx(errors[0], rel=1e-4)
    assert float(result.error) == pytest.approx(min(errors), rel=2e-3)
    got = unpack(result.codes, result.scales, layout, torch.float64)
    # float32 rounding can tip single values at code midpoints; after that the rounds differ by those values only
    assert float((got - base).norm() / base.norm()) < 0.02
    torch.testing.assert_close(result.factor.double(), factor, atol=0.02 * float(factor.abs().max() + 1e-9), rtol=0.05)
    if rounds:
        assert result.error < result.error_before


@pytest.mark.parametrize("side", ["input", "output"])
def test_reported_error_is_the_true_one(side: str) -> None:
    """The closed form ||R||^2 - s^2 tr(B^T B P^T P) against the norm itself."""
    weight, basis = problem(96, 128, 8, side)
    layout = MatrixLayout(96, 128, "nf4")
    result = C.compensate(weight, layout, basis, basis.T @ basis, side=side, scale=0.25, rounds=5)
    dense = unpack(result.codes, result.scales, layout, torch.float32)
    dense = C.plus_low_rank(dense, basis, result.factor, side, 0, 96, scale=0.25)
    torch.testing.assert_close(result.error, (weight - dense).norm() / weight.norm(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize(("shape", "ranks"), [((60, 96), 2), ((60, 96), 3), ((43, 86), 2), ((4, 64), 3)])
def test_shards_give_the_uncut_result(
    shape: tuple[int, int], ranks: int, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(C, "CHUNK_VALUES", 256)  # many chunks too
    weight, basis = problem(*shape, min(4, shape[0] // 2), side)  # a square P leaves rounding alone to be quantized
    layout = MatrixLayout(*shape, "nf4")
    gram = basis.T @ basis
    whole = C.compensate(weight, layout, basis, gram, side=side, scale=0.5, rounds=4)
    shards, results = Shards(ranks), {}

    def work(rank: int) -> None:
        chunk = -(-layout.groups // ranks)
        first, last = layout.rows_of_groups(min(rank * chunk, layout.groups), min((rank + 1) * chunk, layout.groups))
        local = basis if side == "input" else basis[first:last]
        results[rank] = C.compensate(
            weight[first:last],
            layout,
            local,
            gram,
            side=side,
            scale=0.5,
            rounds=4,
            sum_over_shards=shards.sum_for(rank),
        )

    shards.run(work)
    assert_uncut([results[rank] for rank in range(ranks)], whole, side)


def test_rounds_end_when_little_is_to_be_expected() -> None:
    """Gains of a 60m-like layer before training: 0.134, 0.121, 0.057, and 0.033 that are not worth a round."""
    assert C.error_gain(1.0 - 0.9**2, 1.0) == pytest.approx(0.1)
    assert C.expected_gain(0.134, None) == 0.134
    assert C.expected_gain(0.121, 0.134) == pytest.approx(0.109, abs=1e-3)
    assert C.expected_gain(0.057, 0.121) == pytest.approx(0.027, abs=1e-3)
    assert 0.027 < C.SETTLED < 0.109
    assert C.expected_gain(0.1, 0.05) == 0.1, "gains that grow are not carried on"
    assert C.expected_gain(-0.3, 0.5) <= 0, "two losses make no gain"


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    side=st.sampled_from(["input", "output"]),
    rounds=st.integers(0, 6),
    d=st.data(),
)
def test_compensation_never_hurts(rows: int, cols: int, side: str, rounds: int, d: st.DataObject) -> None:
    rank = d.draw(st.integers(1, min(rows, cols)))
    weight, basis = problem(rows, cols, rank, side, seed=rows)
    layout = MatrixLayout(rows, cols, "nf4")
    result = C.compensate(weight, layout, basis, basis.T @ basis, side=side, scale=0.5, rounds=rounds)
    assert torch.isfinite(result.factor).all()
    assert result.error <= result.error_before


def test_scheme_none_loses_nothing() -> None:
    weight, basis = problem(10, 12, 3, "input")
    layout = MatrixLayout(10, 12, "none")
    result = C.compensate(weight, layout, basis, basis.T @ basis, side="input", scale=0.5, rounds=5)
    assert (
        float(result.error) == 0.0 and torch.equal(result.codes.view(torch.float32), weight) and not result.factor.any()
    )


def test_survival_is_one_without_quantization_and_less_with() -> None:
    weight, basis = problem(64, 64, 4, "input")
    for scheme in ("none", "nf4"):
        layout = MatrixLayout(64, 64, scheme)  # type: ignore[arg-type]
        old = torch.randn(64, 4) * 0.01
        merged = weight.clone()
        C.add_low_rank(merged, layout, basis, old, "input", 0.5)
        torch.testing.assert_close(merged, weight + 0.5 * old @ basis.T)
        result = C.compensate(merged, layout, basis, basis.T @ basis, side="input", scale=0.5, rounds=0)
        cross, norm = survival.update_survival(
            merged, layout, result, new_basis=basis, old_basis=basis, old_factor=old, side="input", scale=0.5
        )
        survived = 1.0 + float(cross / norm)
        assert survived == pytest.approx(1.0) if scheme == "none" else survived != pytest.approx(1.0)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("shape", [(300, 64), (520, 96), (43, 86), (700, 33)])
def test_survival_on_any_number_of_ranks_is_that_of_the_same_rows(shape: tuple[int, int], side: str) -> None:
    """Against whole dense matrices, and cut into shards; (700, 33) has groups of 64 rows, the last not full."""
    rows, cols = shape
    old_basis, basis = (problem(*shape, 4, side, seed=seed)[1] for seed in (1, 2))
    layout, sizes = MatrixLayout(rows, cols, "nf4"), (rows, cols) if side == "input" else (cols, rows)
    generator = torch.Generator().manual_seed(3)
    merged, old = problem(*shape, 4, side)[0], 0.5 * torch.randn(sizes[0], 4, generator=generator)
    update = 0.5 * (old @ old_basis.T if side == "input" else old_basis @ old.T)
    merged += update
    result = C.compensate(merged, layout, basis, basis.T @ basis, side=side, scale=0.5, rounds=3)
    dense = unpack(result.codes, result.scales, layout, torch.float32)
    change = C.plus_low_rank(dense, basis, result.factor, side, 0, rows, scale=0.5) - merged
    spacing = max(1, layout.groups // max(1, survival.SAMPLED_ROWS // layout.group_rows))  # of fewer than a chunk
    spacing += 1 if spacing in (2, 4) else 0
    sampled = (torch.arange(rows) // layout.group_rows) % spacing == 0
    if spacing > 1:
        assert 0.3 < sampled.sum() * spacing / rows < 1.7
        sampled[rows // layout.group_rows * layout.group_rows :] = False
    expected = torch.stack([(change * update)[sampled].sum(), update[sampled].square().sum()])
    for ranks in (1, 3):
        found = torch.zeros(2)
        for rank in range(ranks):
            size = -(-layout.groups // ranks)
            groups = slice(min(rank * size, layout.groups), min((rank + 1) * size, layout.groups))
            first, last = layout.rows_of_groups(groups.start, groups.stop)
            local = C.Compensated(
                result.codes[groups],
                None if result.scales is None else result.scales[groups],
                result.factor[first:last] if side == "input" else result.factor,
                result.error,
                result.error_before,
            )
            mine = slice(None) if side == "input" else slice(first, last)
            found += survival.update_survival(
                merged[first:last],
                layout,
                local,
                new_basis=basis[mine],
                old_basis=old_basis[mine],
                old_factor=old[first:last] if side == "input" else old,
                side=side,
                scale=0.5,
                first_row=first,
            )
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    whole = 1.0 + float((change * update).sum() / update.square().sum())
    assert 1.0 + float(expected[0] / expected[1]) == pytest.approx(whole, abs=0.1)


def test_a_lost_column_does_not_break_the_inverse() -> None:
    gram = torch.diag(torch.tensor([1.0, 0.0, 2.0]))
    torch.testing.assert_close(C.gram_inverse(gram), torch.diag(torch.tensor([1.0, 0.0, 0.5])))


@given(r=st.integers(1, 12), extra=st.integers(0, 12), seed=st.integers(0, 99))
def test_transport_is_exact_for_a_rotated_basis(r: int, extra: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    old = torch.linalg.qr(torch.randn(r + extra, r, generator=generator))[0]
    turn = torch.linalg.qr(torch.randn(r, r, generator=generator))[0]
    gradients = torch.randn(5, 7, r, generator=generator)
    first, second = gradients.mean(0), gradients.square().mean(0)
    moved_first, moved_second = first.clone(), second.clone()
    apply_state_policy(moved_first, moved_second, basis_rotation(old, old @ turn), "transport")
    torch.testing.assert_close(moved_first, (gradients @ turn).mean(0), rtol=1e-4, atol=1e-4)
    assert (moved_second >= 0).all()
    # each row of turn^2 sums to one: the total second moment is conserved
    torch.testing.assert_close(moved_second.sum(1), second.sum(1), rtol=1e-4, atol=1e-4)


def test_policies() -> None:
    first, second = torch.ones(3, 2), torch.ones(3, 2)
    apply_state_policy(first, second, torch.zeros(2, 2), "keep")
    assert first.all() and second.all()
    apply_state_policy(first, second, torch.eye(2), "reset")
    assert not first.any() and not second.any()
