"""The start that makes up for quantization: against LoftQ as printed, with a dense SVD; and cut into shards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loqt_scale import LoQTConfig, MergeConfig
from loqt_scale.config import Side
from loqt_scale.errors import ConfigError
from loqt_scale.functional import compensation
from loqt_scale.functional.compensation import Compensated
from loqt_scale.functional.loftq import Packed, Shard, loftq
from loqt_scale.functional.low_rank_linear import LowRankSpec, effective_weight
from loqt_scale.functional.quantization import MatrixLayout, pack, unpack
from tests.unit.shards import Shards, assert_uncut


def spec_of(shape: tuple[int, int], rank: int, side: Side, *, weight: str = "nf4", basis: str = "none") -> LowRankSpec:
    features = shape[1] if side == "input" else shape[0]
    return LowRankSpec(MatrixLayout(*shape, weight), MatrixLayout(features, rank, basis), side, 0.5)


def naive(weight: Tensor, spec: LowRankSpec, rounds: int) -> list[float]:
    """Relative error of every round of LoftQ, in float64 with LAPACK's SVD (P is not quantized)."""
    rank, low_rank, errors = spec.projection.cols, torch.zeros_like(weight, dtype=torch.float64), []
    for _ in range(rounds):
        target = (weight.double() - low_rank).float()
        residual = weight.double() - unpack(*pack(target, spec.base), spec.base, torch.float64)
        left, values, right = torch.linalg.svd(residual)
        low_rank = left[:, :rank] * values[:rank] @ right[:rank]
        errors.append(float((residual - low_rank).norm() / weight.double().norm()))
    return errors


def dense(result: Compensated, basis: Packed, spec: LowRankSpec) -> Tensor:
    base = unpack(result.codes, result.scales, spec.base, torch.float32)
    return effective_weight(base, unpack(*basis, spec.projection, torch.float32), result.factor, spec)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("shape", [(96, 128), (130, 64), (50, 86)])
@pytest.mark.parametrize("rounds", [1, 5])
def test_equals_the_printed_algorithm(shape: tuple[int, int], side: Side, rounds: int) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    spec = spec_of(shape, 12, side)
    result, basis = loftq(weight, Shard(spec), rounds=rounds)
    errors = naive(weight, spec, rounds)
    assert float(result.error) == pytest.approx(min(errors), rel=0.02)  # rounds diverge a little
    plain = unpack(*pack(weight, spec.base), spec.base, torch.float32)
    torch.testing.assert_close(result.error_before, (weight - plain).norm() / weight.norm())
    torch.testing.assert_close(result.error, (weight - dense(result, basis, spec)).norm() / weight.norm())


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize(("shape", "ranks"), [((60, 96), 2), ((43, 86), 2), ((4, 64), 3)])
def test_shards_give_the_uncut_result(
    shape: tuple[int, int], ranks: int, side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of chunks; of the third shape one shard has no rows. P goes through NF4, as layers store it."""
    monkeypatch.setattr(compensation, "CHUNK_VALUES", 256)
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    spec = spec_of(shape, 4, side, basis="nf4")
    whole, basis = loftq(weight, Shard(spec), rounds=3)
    shards, results = Shards(ranks), {}

    def work(rank: int) -> None:
        chunk = -(-spec.base.groups // ranks)
        first, last = (min(part * chunk, spec.base.groups) for part in (rank, rank + 1))
        start, stop = spec.base.rows_of_groups(first, last)
        results[rank] = loftq(weight[start:stop], Shard(spec, start, shards.sum_for(rank)), rounds=3)

    shards.run(work)
    assert all(torch.equal(results[rank][1][0], results[0][1][0]) for rank in range(ranks))
    assert (results[0][1][0] != basis[0]).float().mean() < 0.01
    assert_uncut([results[rank][0] for rank in range(ranks)], whole, side)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    side=st.sampled_from(["input", "output"]),
    rounds=st.integers(1, 4),
    weight=st.sampled_from(["nf4", "nf4_double", "fp4", "int8"]),
    data=st.data(),
)
def test_it_never_hurts(rows: int, cols: int, side: Side, rounds: int, weight: str, data: st.DataObject) -> None:
    spec = spec_of((rows, cols), data.draw(st.integers(1, min(rows, cols))), side, weight=weight, basis="nf4")
    dense_weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows))
    result, basis = loftq(dense_weight, Shard(spec), rounds=rounds)
    assert torch.isfinite(result.factor).all()
    assert result.error <= result.error_before * (1 + 1e-6)
    true = (dense_weight - dense(result, basis, spec)).norm() / dense_weight.norm()
    torch.testing.assert_close(result.error, true, rtol=1e-3, atol=2e-4)


def test_without_rounds_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"compensation_rounds is 0; write 1 or more"):
        LoQTConfig(init="loftq", merge=MergeConfig(compensation_rounds=0))


def test_it_beats_a_random_subspace_by_what_singular_vectors_hold_more() -> None:
    """The error that is left of plain quantization's, against that of the same rank with a random P."""
    shape = (256, 192)
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    spec = spec_of(shape, 48, "input")
    found, _ = loftq(weight, Shard(spec), rounds=1)
    random = torch.linalg.qr(torch.randn(192, 48, generator=torch.Generator().manual_seed(1)))[0]
    any_basis = compensation.compensate(weight, spec.base, random, random.T @ random, side="input", scale=0.5, rounds=1)
    # a random quarter of the directions holds a quarter of the squares, the leading quarter about a half
    assert float(any_basis.error / any_basis.error_before) == pytest.approx(0.75**0.5, rel=0.02)
    assert float(found.error / found.error_before) < 0.76
