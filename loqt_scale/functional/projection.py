"""The subspace P of a gradient: its leading singular vectors, by three methods.

Shapes: G is the weight gradient (O x I); P has orthonormal columns and is (I x r) on side `input` (right singular
vectors) or (O x r) on side `output` (left ones). F is the side's feature dimension, I or O, and C the other one.

* `svd_basis`         exact, needs dense G: the oracle.
* `randomized_basis`  subspace iteration on dense G (Halko, Martinsson, Tropp 2011).
* `sketch_basis`      single pass, never needs G. For y = x W^T, G = dY^T X is a sum over tokens, hence so is a sketch

      side input    Z = G^T Omega = X^T (dY Omega)      Omega (O x l), Z (I x l)
      side output   Z = G Omega   = dY^T (X Omega)      Omega (I x l), Z (O x l)

  which accumulates over micro-batches and adds up over ranks. Z's leading left singular vectors are P (Halko et al.,
  section 4; only one side's vectors are wanted, so the second sketch of the two-sided single-pass methods is not
  needed: at equal memory the one-sided one keeps more of the gradient's energy, see docs/decisions.md).
  The last `VALIDATION_COLUMNS` of Omega do not enter P: they estimate, without bias, how much energy P keeps.
"""

from __future__ import annotations

import torch
from torch import Tensor

VALIDATION_COLUMNS = 8
SEARCH_COLUMNS = 16  # beyond r, in the subspace iteration on a sketch: its last columns converge last
SKETCH_ITERATIONS = 2


def sketch_width(rank: int, out_features: int, in_features: int, oversampling: float) -> int:
    """Columns of Omega: (1 + oversampling) r, cut at the layer's smaller side, plus the validation columns."""
    return min(out_features, in_features, max(rank, round((1.0 + oversampling) * rank))) + VALIDATION_COLUMNS


def test_matrix(features: int, width: int, *, seed: int, device: torch.device) -> Tensor:
    """Omega, (features, width) float32, from a generator of its own (the global RNG is untouched).

    The columns that enter P are orthonormal (a little better than Gaussian ones, and exact once l reaches the full
    dimension); the validation columns are standard normal, which makes their energies unbiased.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    omega = torch.randn(features, width, generator=generator, device=device)
    used = width - VALIDATION_COLUMNS
    omega[:, :used] = torch.linalg.qr(omega[:, :used])[0]
    return omega


def sketch_basis(sketch_FL: Tensor, rank: int) -> Tensor:
    """P from a sketch Z of one gradient, or of several at once.

    Args:
        sketch_FL: Z, float32, its last `VALIDATION_COLUMNS` columns unused here; (..., F, l).
        rank: r, at most l.

    Returns:
        (..., F, r) orthonormal columns, float32.
    """
    used = _normalized(sketch_FL[..., :-VALIDATION_COLUMNS].float())
    width = min(*used.shape[-2:], rank + SEARCH_COLUMNS)
    return leading_vectors(used, rank, start_FK=used[..., :width], iterations=SKETCH_ITERATIONS)


def leading_vectors(matrix_FC: Tensor, rank: int, *, start_FK: Tensor, iterations: int) -> Tensor:
    """The leading left singular vectors by subspace iteration and a Rayleigh-Ritz step (Halko et al., section 4.5).

    In float32 it is a quarter of the work of an SVD that throws most of its vectors away, and it rounds better: every
    pass is re-orthonormalised and the small eigenproblem is solved in float64, so that even columns whose singular
    values are 1e-5 of the largest survive a rounding of the input (LAPACK's float32 SVD loses them).

    Args:
        matrix_FC: The matrix, or several: (..., F, C).
        rank: r, at most K.
        start_FK: Where the iteration starts: K columns that span about the wanted space.
        iterations: Passes over the matrix and back.

    Returns:
        (..., F, r) orthonormal columns, float32, in the order of their singular values.
    """
    q_FK, _ = torch.linalg.qr(start_FK)
    for _ in range(iterations):
        q_FK, _ = torch.linalg.qr(matrix_FC @ (matrix_FC.mT @ q_FK))
    images = (matrix_FC.mT @ q_FK).double()
    _, vectors = torch.linalg.eigh(images.mT @ images)  # ascending
    return _signed(q_FK @ vectors.flip(-1)[..., :rank].to(q_FK.dtype))


def sketched_energy(sketch_FL: Tensor, basis_FR: Tensor) -> Tensor:
    """Estimates `captured_energy` from the validation columns, which P has not seen: in [0, 1], one of each matrix.

    A Gaussian sketch keeps squared norms in expectation: E||A Omega||_F^2 = l ||A||_F^2, with A = G^T and P^T G^T
    alike.
    """
    unseen = _normalized(sketch_FL[..., -VALIDATION_COLUMNS:].float())
    kept, whole = (values.square().sum((-2, -1)) for values in (basis_FR.float().mT @ unseen, unseen))
    return kept / whole.clamp_min(1e-30)


def svd_basis(gradient_OI: Tensor, rank: int, side: str) -> Tensor:
    """P from an exact SVD of the dense gradient, float32."""
    left, _, right = torch.linalg.svd(_normalized(gradient_OI.double()), full_matrices=False)
    return _signed((right[:rank].T if side == "input" else left[:, :rank]).float())


def randomized_basis(
    gradient_OI: Tensor, rank: int, side: str, *, oversampling: float, power_iterations: int, seed: int
) -> Tensor:
    """P from a randomized SVD of the dense gradient with `power_iterations` re-orthonormalised passes, float32."""
    matrix = _normalized(gradient_OI.float() if side == "output" else gradient_OI.float().T)  # we want its left vectors
    width = min(*matrix.shape, max(rank, round((1.0 + oversampling) * rank)))
    generator = torch.Generator(device=matrix.device).manual_seed(seed)
    omega = torch.randn(matrix.shape[1], width, generator=generator, device=matrix.device)
    return leading_vectors(matrix, rank, start_FK=matrix @ omega, iterations=power_iterations)


def _signed(basis_FR: Tensor) -> Tensor:
    """Each column with the sign that makes its largest entry positive.

    A singular vector's sign is arbitrary, and NF4 is not symmetric about zero: without a rule, rounding errors of 1e-7
    in a gradient could flip a column and with it the whole quantized P.
    """
    largest = basis_FR.gather(-2, basis_FR.abs().argmax(-2, keepdim=True))
    return (basis_FR * torch.where(largest < 0, -1.0, 1.0)).contiguous()


def captured_energy(gradient_OI: Tensor, basis_FR: Tensor, side: str) -> Tensor:
    """||G P||_F^2 / ||G||_F^2 (input side) or ||P^T G||_F^2 / ||G||_F^2 (output side): scalar in [0, 1]."""
    gradient, basis = gradient_OI.double(), basis_FR.double()
    projected = gradient @ basis if side == "input" else basis.T @ gradient
    return projected.square().sum() / gradient.square().sum().clamp_min(1e-300)


def subspace_overlap(old_FR: Tensor, new_FR: Tensor) -> Tensor:
    """||P_old^T P_new||_F^2 / r: 1 for the same subspace, about r / F for unrelated ones."""
    return (old_FR.float().T @ new_FR.float()).square().sum() / new_FR.shape[1]


def _normalized(matrix: Tensor) -> Tensor:
    """Scaled to a largest entry of 1: gradients of 1e-6 would otherwise meet absolute tolerances inside LAPACK."""
    return matrix / matrix.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
