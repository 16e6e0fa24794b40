"""Part of benchmarks/gpu.py: what products, factorisations and Muon's steps of the 1b shape take by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from common import table
from gpu_common import Place, Table
from torch import Tensor

from loqt_scale.config import SubspaceConfig
from loqt_scale.functional.orthogonal import gram, orthogonalizer
from loqt_scale.functional.projection import sketch_basis, sketch_width, test_matrix

Work = tuple[str, Callable[[], object], float]  # name, work, its FLOPs (0: not counted)


def products(place: Place, repeats: int) -> Iterator[Table]:
    """Milliseconds of each; the papers' width of the MLP, and the next one that is aligned."""
    hidden, widths, rank, tokens = (64, (85, 88), 16, 128) if place.quick else (2048, (5461, 5464), 512, 16384)
    rows: list[list[object]] = []
    for width in widths:
        rows += [_row(place, work, repeats) for work in _linear(place, width, hidden, tokens)]
        rows += [_row(place, work, repeats) for work in _merge(place, width, hidden, rank)]
    rows += [_row(place, work, repeats) for work in _rest(place, widths[0], hidden, rank)]
    shape = "llama_micro, tiny shapes" if place.quick else "llama_1b's shapes"
    text = f"{table(['what', 'ms', 'TFLOP/s'], rows)}\n\n{shape}, {tokens} tokens; means of {repeats} after one."
    yield place.title("GPU: products and factorisations"), text


def _row(place: Place, work: Work, repeats: int) -> list[object]:
    name, call, flops = work
    call()
    seconds = place.seconds(lambda: [call() for _ in range(repeats)]) / repeats
    return [name, f"{1000 * seconds:.2f}", f"{flops / seconds / 1e12:.0f}" if flops else "-"]


def _linear(place: Place, width: int, hidden: int, tokens: int) -> Iterator[Work]:
    """A linear's three products in both dtypes."""
    for dtype in (torch.bfloat16, torch.float32):
        x, w, y = (
            torch.randn(*size, device=place.device, dtype=dtype)
            for size in ((tokens, hidden), (width, hidden), (tokens, width))
        )
        flops, name = 2.0 * tokens * hidden * width, f"{width} x {hidden}, {str(dtype).removeprefix('torch.')}"
        yield f"forward, {name}", lambda x=x, w=w: x @ w.T, flops
        yield f"input gradient, {name}", lambda y=y, w=w: y @ w, flops
        yield f"weight gradient, {name}", lambda x=x, y=y: y.T @ x, flops


def _merge(place: Place, width: int, hidden: int, rank: int) -> Iterator[Work]:
    """The two products of a round of compensation, float32."""
    w, b, p = (torch.randn(*size, device=place.device) for size in ((width, hidden), (width, rank), (hidden, rank)))
    flops, name = 2.0 * width * hidden * rank, f"{width} x {hidden}, rank {rank}"
    yield f"W + B P^T, {name}", lambda: torch.addmm(w, b, p.T), flops
    yield f"W P, {name}", lambda: w @ p, flops


def _rest(place: Place, width: int, hidden: int, rank: int) -> Iterator[Work]:
    """Finding P from sketches, and Muon's update."""
    columns = sketch_width(rank, hidden, hidden, SubspaceConfig().oversampling)
    for count in (1, 4):
        sketches = torch.randn(count, hidden, columns, device=place.device)
        wide = sketches.double()
        square = wide.mT @ wide
        yield f"P of {count} sketch(es) {hidden} x {columns}", lambda s=sketches: sketch_basis(s, rank), 0.0
        yield f"its Gram matrix, float64, {count}", lambda w=wide: w.mT @ w, 2.0 * wide.numel() * columns
        yield f"Cholesky's factors of {count} {columns}², float64", lambda s=square: torch.linalg.cholesky_ex(s), 0.0
        yield f"QR of {count} {hidden} x {columns}, float64", lambda w=wide: torch.linalg.qr(w), 0.0
    yield f"Omega of {hidden}", lambda: test_matrix(hidden, seed=0, device=place.device), 0.0
    momentum = torch.randn(width, rank, device=place.device)
    squares: Tensor = gram(momentum)
    eight = squares.expand(8, -1, -1)
    yield f"Muon, {width} x {rank}: Gram matrix", lambda: gram(momentum), 0.0
    yield "Muon: iteration", lambda: orthogonalizer(squares), 0.0
    yield "Muon: iteration of eight", lambda: orthogonalizer(eight), 0.0
    yield "Muon: product", lambda: momentum @ squares.float(), 0.0
