"""Updates that torch.compile makes one kernel of: bit for bit what the operators give one by one."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._inductor import config as inductor

from loqt_scale.errors import UserError
from loqt_scale.functional.blockwise import _search, level_tables
from loqt_scale.functional.fused_multiply_add import exact_root
from loqt_scale.functional.rounding import seed_from, stochastic_bfloat16
from loqt_scale.optim import RowShards, StreamedAdamW, StreamedMuon, step_if_finite
from loqt_scale.optim.chunk_updates import in_one_kernel
from loqt_scale.optim.streamed import _terms

ROOT = Path(__file__).resolve().parents[3]
SHAPES = [(300, 64), (70,), (9, 48), (1, 64), (4, 10)]  # with blocks of 64, none, of 48, one block, none


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Each test compiles its own few kinds, of which torch keeps eight."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def optimizer_of(name: str, parameters: list[nn.Parameter], states: str, *, compiled: bool) -> StreamedAdamW:
    adam: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "states": states, "seed": 3}
    rows: dict[str, Any] = {"local": lambda tensor: tensor, "first_row": lambda _: 0, "compiled": compiled}
    if name == "adamw":
        return StreamedAdamW([{"params": parameters, "lr": 0.01}], **adam, **rows | {"first_row": lambda _: 5})
    groups = [{"params": [p for p in parameters if p.dim() == 2], "lr": 0.01, "muon": True}]
    return StreamedMuon(groups, momentum=0.9, shards=RowShards(), **adam, **rows)


def train(
    name: str,
    dtype: torch.dtype,
    states: str,
    *,
    compiled: bool,
    guarded: bool = True,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Weights and what is kept of them after five steps, of which one has a gradient that is not finite."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]
    optimizer = optimizer_of(name, parameters, states, compiled=compiled)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)  # no constant of the compiled code
        for p in parameters:
            sizes = torch.exp(3.0 * torch.randn(p.shape, generator=generator))  # decades in a block
            p.grad = (torch.randn(p.shape, generator=generator) * sizes * 1e-3).to(device, p.dtype)
        if guarded:
            step_if_finite(optimizer, torch.tensor(math.nan if step == 2 else 1.0, device=device))
        else:
            optimizer.step()
    states = [optimizer.state[p] for p in parameters if p in optimizer.state]
    kept = [t for own in states for name in ("exp_avg", "exp_avg_sq") if name in own for t in own[name].tensors()]
    return [p.detach() for p in parameters] + kept


KINDS = [
    ("adamw", torch.bfloat16, "int8"),
    ("adamw", torch.float32, "float32"),
    ("muon", torch.bfloat16, "int8"),
    ("muon", torch.float32, "float32"),
]


@pytest.mark.parametrize(
    ("name", "dtype", "states", "guarded"),
    [
        (*KINDS[0], True),
        (*KINDS[3], False),
        *(pytest.param(*KINDS[kind], True, marks=pytest.mark.long) for kind in (1, 2, 3)),
        *(pytest.param(*KINDS[kind], False, marks=pytest.mark.long) for kind in (0, 1, 2)),
    ],
)
def test_one_kernel_has_the_bits_of_its_operators(name: str, dtype: torch.dtype, states: str, guarded: bool) -> None:
    with torch.compiler.set_stance("force_eager"):
        expected = train(name, dtype, states, compiled=True, guarded=guarded)
    found = train(name, dtype, states, compiled=True, guarded=guarded)
    assert len(found) == len(expected) > 6
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    plain = train(name, dtype, states, compiled=False, guarded=guarded)  # whose roots are a library's
    for a, b in zip(found[: len(SHAPES)], plain, strict=False):
        torch.testing.assert_close(a, b, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_gpus_kernels_have_the_bits_too() -> None:
    """What torch.compile writes for a GPU, in Triton's interpreter: one kernel (Muon: two), and no value differs."""
    pytest.importorskip("triton", reason="pip install triton")
    words = [sys.executable, "benchmarks/updates.py", "--triton", "--quick"]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    rows = [line.split(" | ") for line in ran.stdout.splitlines() if line.startswith(("| float32", "| bfloat16"))]
    assert len(rows) == 15, ran.stderr[-2000:]
    assert {(row[1], row[3]) for row in rows} == {("AdamW", "1"), ("Muon", "2")}
    assert all(row[5] == "0 |" for row in rows)


def test_without_a_compiler_it_is_said_what_to_write() -> None:
    """At the first update, which has changed nothing then."""
    parameter = nn.Parameter(torch.ones(8, 64))
    parameter.grad = torch.ones_like(parameter)
    optimizer = optimizer_of("adamw", [parameter], "int8", compiled=True)
    with (
        inductor.patch({"cpp.cxx": (None, "/nowhere/c++"), "force_disable_caches": True}),
        pytest.raises(UserError, match=r"optim\.compile: .*install a C\+\+ compiler .*, or write optim.compile: false"),
    ):
        optimizer.step()
    assert torch.equal(parameter, torch.ones(8, 64))


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), signed=st.booleans())
def test_eight_comparisons_are_bucketize(seed: int, signed: bool) -> None:
    """Of any values: levels, midpoints and their neighbours, infinite ones and NaN."""
    levels, midpoints = level_tables(signed, torch.device("cpu"))
    near = torch.cat([levels, midpoints, torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0])])
    drawn = torch.randn(500, generator=torch.Generator().manual_seed(seed)).pow(3)
    values = torch.cat([near, near.nextafter(torch.tensor(9.0)), near.nextafter(torch.tensor(-9.0)), drawn])
    assert torch.equal(_search(values, midpoints), torch.bucketize(values, midpoints, out_int32=True))


@settings(max_examples=25)
@given(seed=st.integers(-(2**63), 2**63 - 1), first=st.integers(0, 2**40), values=st.integers(1, 300))
def test_a_seed_that_counts_from_a_chunk(seed: int, first: int, values: int) -> None:
    seeds, numbers = torch.tensor(seed), torch.linspace(-3.0, 3.0, values)
    expected = stochastic_bfloat16(numbers, seed=seeds, first_index=first)
    assert torch.equal(stochastic_bfloat16(numbers, seed=seed_from(seeds, first), first_index=0), expected)


def test_roots_are_rounded_correctly() -> None:
    """A square of 12 bits has an exact root, and so do the nearest numbers to a square of 24 bits."""
    exact = torch.arange(1.0, 4096.0)
    assert torch.equal(exact_root(exact.square()), exact)
    drawn = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    root = exact_root(drawn).double()
    above, below = (root.float().nextafter(torch.tensor(end)).double() for end in (9.0, 0.0))
    error = (root.square() - drawn.double()).abs()  # the nearest root has the least error, up to the square's curve
    assert bool(((root - drawn.double().sqrt()).abs() <= (above - drawn.double().sqrt()).abs()).all())
    assert bool(((root - drawn.double().sqrt()).abs() <= (below - drawn.double().sqrt()).abs()).all())
    assert float(error.max()) < 2**-23


@pytest.mark.parametrize("count", [7, 100, 1000])
def test_rates_are_those_of_a_parameter_alone(count: int) -> None:
    """Which parameters a rank updates together is its own; a CPU's `pow` of eight numbers has other last bits."""
    group: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "lr": 0.01, "weight_decay": 0.0}
    counts = torch.arange(count, count + 40, dtype=torch.float64)
    alone = [next(iter(_terms(one.reshape(1), group))) for one in counts]
    for together, single in zip(_terms(counts, group), alone, strict=True):
        assert torch.equal(together.root, single.root)
        assert torch.equal(together.rate, single.rate)


def test_a_kind_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the lengths, that of the table of levels too, and whatever the rates."""
    counter, compiled = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda update, **_: compiled(update, dynamic=False, backend=counter))
    in_one_kernel.cache_clear()
    parameters = [nn.Parameter(torch.ones(rows, 64)) for rows in (256, 255, 64, 2, 300)]
    optimizer = optimizer_of("adamw", parameters, "int8", compiled=True)
    for step in range(3):
        optimizer.param_groups[0] |= {"lr": 0.01 / (1 + step), "weight_decay": 0.1 * step}
        for p in parameters:
            p.grad = torch.full_like(p, 1.0 + step)
        optimizer.step()
    in_one_kernel.cache_clear()
    assert counter.frame_count == 1
