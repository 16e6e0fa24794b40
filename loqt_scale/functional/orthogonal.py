"""Muon's spectral step from a Gram matrix (Jordan et al. 2024; scaled as in Liu et al. 2025, "Muon is scalable").

Muon replaces a momentum matrix U (N x r) by the nearest matrix with orthonormal columns, U (U^T U)^(-1/2), which five
Newton-Schulz iterations find about

    X <- X (a 1 + b A + c A^2),   A = X^T X,   X_0 = U / ||U||_F.

Every iterate is U times a polynomial of G = U^T U. So here the iteration runs on r x r matrices alone, and the step is
one product U Q. Where the rows of U are spread over ranks, G is a sum over them, Q is the same on all, and no rank ever
needs a row that is not its own.

G squares U's singular values, so it is kept in float64: those below 3e-4 of the largest would be rounding in float32,
and the iteration makes the weak ones up to 485 times stronger.
"""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c: singular values end between 0.7 and 1.2, soon
ITERATIONS = 5
RMS = 0.2  # of an update's entries, about what AdamW's have
CHUNK_VALUES = 2**20  # float64 copies of rows that a Gram matrix is added up from


def gram(matrix_NR: Tensor) -> Tensor:
    """G = U^T U in float64, (r, r), a chunk of rows at a time.

    Args:
        matrix_NR: U, (N, r) float32; N may be 0.
    """
    columns = matrix_NR.shape[1]
    total = torch.zeros(columns, columns, dtype=torch.float64, device=matrix_NR.device)
    for rows in matrix_NR.split(max(1, CHUNK_VALUES // columns)):
        wide = rows.double()
        total.addmm_(wide.T, wide)
    return total


def orthogonalizer(gram_RR: Tensor) -> Tensor:
    """Q, so that the columns of U Q are about orthonormal.

    Args:
        gram_RR: G = U^T U, or several: (..., r, r) float64.

    Returns:
        (..., r, r) float64, symmetric. Of G = 0 it is finite.
    """
    a, b, c = COEFFICIENTS
    one = torch.eye(gram_RR.shape[-1], dtype=gram_RR.dtype, device=gram_RR.device)
    square = gram_RR.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(torch.finfo(torch.float32).tiny)
    power, product = gram_RR / square, one / square.sqrt()
    for iteration in range(ITERATIONS):
        factor = a * one + b * power + c * (power @ power)
        product = product @ factor
        if iteration < ITERATIONS - 1:
            power = factor @ power @ factor  # all are polynomials of G: they commute
    return product


def update_scale(rows: int, columns: int) -> float:
    """0.2 sqrt(max(N, r)): by it an orthogonalized (N, r) matrix is multiplied, so that AdamW's learning rates suit."""
    return RMS * float(max(rows, columns)) ** 0.5


def pack_symmetric(matrices_LRR: Tensor) -> Tensor:
    """The upper triangles, (L, r (r + 1) / 2): what symmetric matrices send over the wire."""
    rows, columns = _triangle(matrices_LRR.shape[-1], matrices_LRR.device)
    return matrices_LRR[:, rows, columns]


def unpack_symmetric(triangles_LT: Tensor, size: int) -> Tensor:
    """What `pack_symmetric` was given, (L, size, size)."""
    rows, columns = _triangle(size, triangles_LT.device)
    whole = triangles_LT.new_empty(triangles_LT.shape[0], size, size)
    whole[:, rows, columns] = triangles_LT
    whole[:, columns, rows] = triangles_LT
    return whole


def _triangle(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(size, size, device=device)
    return rows, columns
