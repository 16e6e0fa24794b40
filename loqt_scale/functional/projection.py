"""The subspace P of a gradient: its leading directions, by three methods.

Shapes: G is the weight gradient (O x I); P has orthonormal columns and is (I x r) on side `input` (right singular
vectors) or (O x r) on side `output` (left ones). F is the side's feature dimension, I or O, and C the other one.

* `svd_basis`         exact, needs dense G: the oracle.
* `randomized_basis`  subspace iteration on dense G (Halko, Martinsson, Tropp 2011).
* `sketch_basis`      single pass, never needs G. For y = x W^T, G = dY^T X is a sum over tokens, hence so is a sketch

      side input    Z = G^T Omega = X^T (dY Omega)      Omega (O x l), Z (I x l)
      side output   Z = G Omega   = dY^T (X Omega)      Omega (I x l), Z (O x l)

  which accumulates over micro-batches and adds up over ranks. Z's leading left singular vectors are P (Halko et al.,
  section 4; only one side's vectors are wanted, so the second sketch of the two-sided single-pass methods is not
  needed: at equal memory the one-sided one keeps more of the gradient's energy, see docs/decisions.md). With l = r,
  the default, all of Z's range is P's, and no singular vectors are computed: its columns are made orthonormal in turn.
  Omega is sparse: it adds up columns with random signs, which costs no product (see `test_matrix`).
  The last `VALIDATION_COLUMNS` of Omega do not enter P: they estimate, without bias, how much energy P keeps.

*P is a stable function of its input*: rounding does not choose it. A gradient may hold fewer than r directions above
rounding (a batch of fewer than r different tokens does), and singular vectors know no sign. Therefore

* every matrix M gets a **background**: P is of [M, c ||M||_F D], of a sketch M of r columns M + c ||M||_F D, with
  seeded D and c a little above rounding. Where the gradient is stronger, the background moves nothing; where it holds
  nothing, P's columns come from D, orthogonal to the gradient's own, instead of from rounding. There is no threshold
  that a value could cross.
* every column gets the **sign** that makes its inner product with one fixed dense direction positive (`_signed`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from loqt_scale.functional.seeding import stable_seed

VALIDATION_COLUMNS = 8
SEARCH_COLUMNS = 16  # beyond r, in a subspace iteration: its last columns converge last
# Strength of the background's directions, of the whole gradient's. Sums in float32 leave errors of 1e-7 of it, which
# turn a direction of 1e-4 by a hundredth of the distance to its neighbours; what is weaker has no place of its own.
# (bfloat16 rounds at 6e-4: there rounding has a say in the last columns all the same.)
BACKGROUND = 1e-4
# The same for columns that are made orthonormal in turn: what is left of one without those before it may be weak.
# Two orders of summing turned P by 1e-4 with 1e-4 here, by 2e-5 with 1e-3, which costs less than 1e-3 of the energy.
RANGE_BACKGROUND = 1e-3


def sketch_width(rank: int, out_features: int, in_features: int, oversampling: float) -> int:
    """Columns of Omega: (1 + oversampling) r, cut at the layer's smaller side, plus the validation columns."""
    return min(out_features, in_features, max(rank, round((1.0 + oversampling) * rank))) + VALIDATION_COLUMNS


def test_matrix(features: int, *, seed: int, device: torch.device) -> Tensor:
    """What Omega is made of, (features, 1 + `VALIDATION_COLUMNS`) float32; the global RNG is untouched.

    The first column holds signs: of the k columns of Omega that enter P, each adds up features with these signs, one of
    every k (a count sketch with equal buckets, see `times_test_matrix`). They are orthogonal, exact once k reaches the
    full dimension, and need additions only. The other columns here are the validation columns, standard normal, which
    makes their energies unbiased.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    omega = torch.randn(features, 1 + VALIDATION_COLUMNS, generator=generator, dtype=torch.float32, device=device)
    omega[:, 0] = torch.where(omega[:, 0] < 0, -1.0, 1.0)
    return omega


def times_test_matrix(matrix_TC: Tensor, omega: Tensor, width: int) -> Tensor:
    """M Omega, (T, width).

    Args:
        matrix_TC: M, any float dtype.
        omega: Of `test_matrix`, (C, 1 + `VALIDATION_COLUMNS`).
        width: l, of `sketch_width`.
    """
    omega = omega.to(matrix_TC.dtype)
    signs, used = omega[:, 0].contiguous(), width - VALIDATION_COLUMNS  # a strided row would not vectorize
    total = matrix_TC[:, :used] * signs[:used]
    for start in range(used, matrix_TC.shape[1], used):
        for to, first, last in _turned(start, used, matrix_TC.shape[1]):
            total[:, to : to + last - first].addcmul_(matrix_TC[:, first:last], signs[first:last])
    validation = omega[:, 1:].T.contiguous() @ matrix_TC.T  # this way round: a CPU takes a third of the time
    return torch.cat([total, validation.T], 1)


def _turned(start: int, used: int, features: int) -> list[tuple[int, int, int]]:
    """Where features [start, start + used) are added: (first bucket, first feature, one past the last), turned round.

    Each k features are turned by another golden-ratio step. Else features k apart would share a bucket: those of one
    place in all heads, where k is a multiple of a head's size, and heavy ones would meet.
    """
    turn = round(start // used * 0.6180339887 * used) % used
    pieces = ((turn, start, start + used - turn), (0, start + used - turn, start + used))
    return [(to, first, min(last, features)) for to, first, last in pieces if first < min(last, features)]


def background(features: int, rank: int, *, seed: int, device: torch.device) -> Tensor:
    """D, (features, rank) float32: directions of about unit length that P takes where a gradient has none of its own.

    Args:
        features: F.
        rank: r: as many as P has columns, so that even a gradient of zeros gives a basis.
        seed: Of the run and merge: other directions each time, the same ones on every rank.
        device: Where they are made.
    """
    generator = torch.Generator(device=device).manual_seed(stable_seed("background", seed))
    normal = torch.randn(features, rank, generator=generator, dtype=torch.float32, device=device)
    return normal / features**0.5


def sketch_basis(sketch_FL: Tensor, rank: int, *, seed: int = 0) -> Tensor:
    """P from a sketch Z of one gradient, or of several at once.

    Args:
        sketch_FL: Z, float32, its last `VALIDATION_COLUMNS` columns unused here; (..., F, l).
        rank: r, at most l.
        seed: Of the background.

    Returns:
        (..., F, r) orthonormal columns, float32.
    """
    columns = sketch_FL[..., :-VALIDATION_COLUMNS]
    if columns.shape[-1] == rank:
        return orthonormal_basis(columns, seed=seed)
    return range_basis(columns, rank, seed=seed)


def orthonormal_basis(matrix_FR: Tensor, *, seed: int = 0) -> Tensor:
    """A basis of a matrix's range, or of those of several: its columns on their background, orthonormalised in turn.

    Gram-Schmidt by Cholesky's factor of the Gram matrix in float64, which no GPU is slow at. The background bounds that
    matrix's condition number, to 1e7 or so, unless the columns nearly fill the space: then by Householder's QR.
    Unlike singular vectors, no column turns into another one where singular values are close.

    Args:
        matrix_FR: Any float dtype, (..., F, r).
        seed: Of the background.

    Returns:
        (..., F, r) orthonormal columns, float32.
    """
    matrix = _normalized(matrix_FR.float())
    features, rank = matrix.shape[-2:]
    wide = matrix.double() + _background_of(matrix, rank, seed=seed, strength=RANGE_BACKGROUND)
    if features < 2 * rank:
        return _signed(torch.linalg.qr(wide)[0].float())
    lower, _ = torch.linalg.cholesky_ex(wide.mT @ wide)
    return _signed(torch.linalg.solve_triangular(lower.mT, wide, upper=True, left=False).float())


def range_basis(matrix_FC: Tensor, rank: int, *, seed: int = 0) -> Tensor:
    """The leading left singular vectors of a matrix that has few columns, or of several at once.

    They come from the eigenvectors of its Gram matrix, in float64: there the background's squares, 1e-8 of the
    greatest, are far above rounding. It is faster than the QR factorisations of a subspace iteration, and exact.

    Args:
        matrix_FC: Any float dtype, (..., F, C).
        rank: r, at most C.
        seed: Of the background.

    Returns:
        (..., F, r) orthonormal columns, float32.
    """
    matrix = _normalized(matrix_FC.float())
    wide = matrix.double()
    wide[..., :rank] += _background_of(matrix, rank, seed=seed)
    squares, vectors = torch.linalg.eigh(wide.mT @ wide)  # ascending
    leading = squares.flip(-1)[..., :rank].clamp_min(torch.finfo(torch.float64).tiny)
    return _signed((wide @ (vectors.flip(-1)[..., :rank] / leading.sqrt().unsqueeze(-2))).float())


def leading_vectors(
    matrix_FC: Tensor, background_FR: Tensor, rank: int, *, start_FK: Tensor, iterations: int
) -> Tensor:
    """The leading left singular vectors of a matrix on its background, [M, background].

    By subspace iteration and a Rayleigh-Ritz step (Halko et al., section 4.5). In float32 it is a quarter of the work
    of an SVD that throws most of its vectors away, and it rounds better: every pass is re-orthonormalised and the small
    eigenproblem is solved in float64, so that even columns whose singular values are 1e-5 of the largest survive a
    rounding of the input (LAPACK's float32 SVD loses them).

    Args:
        matrix_FC: The matrix, or several: (..., F, C).
        background_FR: What stands beside each, (..., F, r).
        rank: r, at most K.
        start_FK: Where the iteration starts: K columns that span about the wanted space of M.
        iterations: Passes over the matrix and back.

    Returns:
        (..., F, r) orthonormal columns, float32, in the order of their singular values.
    """
    start = start_FK.clone()
    start[..., :rank] += background_FR
    q_FK, _ = torch.linalg.qr(start)
    for _ in range(iterations):
        product = matrix_FC @ (matrix_FC.mT @ q_FK)
        q_FK, _ = torch.linalg.qr(product.add_(background_FR @ (background_FR.mT @ q_FK)))
    images = torch.cat([matrix_FC.mT @ q_FK, background_FR.mT @ q_FK], -2).double()
    _, vectors = torch.linalg.eigh(images.mT @ images)  # ascending
    return _signed(q_FK @ vectors.flip(-1)[..., :rank].to(q_FK.dtype))


def kept_of_sketch(sketch_FL: Tensor, basis_FR: Tensor) -> Tensor:
    """What P keeps of a gradient, seen through the validation columns, which P has not seen: (..., r, 8).

    K = P^T V / ||V||_F of the validation columns V. A Gaussian sketch keeps squared norms in expectation,
    E||A Omega||^2 = l ||A||^2 with A = G^T and P^T G^T alike, so ||K||_F^2 estimates `captured_energy`.
    """
    unseen = _normalized(sketch_FL[..., -VALIDATION_COLUMNS:].float())
    norm = torch.linalg.matrix_norm(unseen, keepdim=True)
    return (basis_FR.float().mT @ unseen) / norm.clamp_min(1e-15)


def kept_of_gradient(gradient_OI: Tensor, basis_FR: Tensor, side: str) -> Tensor:
    """The same of a dense gradient, by as many random columns, which are always the same, (r, 8)."""
    matrix_FC = gradient_OI if side == "output" else gradient_OI.T
    columns = test_matrix(matrix_FC.shape[1], seed=matrix_FC.shape[1], device=matrix_FC.device)[:, 1:]
    return kept_of_sketch(_normalized(matrix_FC.float()) @ columns, basis_FR)


def svd_basis(gradient_OI: Tensor, rank: int, side: str, *, seed: int = 0) -> Tensor:
    """P from an exact SVD of the dense gradient on its background (that of `seed`), float32."""
    matrix = _normalized((gradient_OI if side == "output" else gradient_OI.T).double())  # we want its left vectors
    back = _background_of(matrix, rank, seed=seed)
    return _signed(torch.linalg.svd(torch.cat([matrix, back], -1), full_matrices=False)[0][:, :rank].float())


def randomized_basis(
    gradient_OI: Tensor,
    rank: int,
    side: str,
    *,
    oversampling: float,
    power_iterations: int,
    seed: int,
) -> Tensor:
    """P from a randomized SVD of the dense gradient with `power_iterations` re-orthonormalised passes, float32.

    Of (1 + `oversampling`) r columns, and of r + `SEARCH_COLUMNS` at least.
    """
    matrix = _normalized((gradient_OI if side == "output" else gradient_OI.T).float())
    width = min(*matrix.shape, max(rank + SEARCH_COLUMNS, round((1.0 + oversampling) * rank)))
    generator = torch.Generator(device=matrix.device).manual_seed(seed)
    omega = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float32, device=matrix.device)
    back = _background_of(matrix, rank, seed=seed)
    return leading_vectors(matrix, back, rank, start_FK=matrix @ omega, iterations=power_iterations)


def _background_of(matrix_FC: Tensor, rank: int, *, seed: int, strength: float = BACKGROUND) -> Tensor:
    """c ||M||_F D of each matrix, c being `strength`, (..., F, r); of a matrix of zeros D itself."""
    directions = background(matrix_FC.shape[-2], rank, seed=seed, device=matrix_FC.device)
    norm = torch.linalg.matrix_norm(matrix_FC, keepdim=True)
    return torch.where(norm > 0, strength * norm, 1.0) * directions


def sign_direction(features: int, device: torch.device) -> Tensor:
    """The direction that P's columns have a positive inner product with, (features, 1) float32: always the same.

    So columns keep their signs from merge to merge. Its entries are at least 1 in size: columns of few entries have a
    clear sign, too.
    """
    generator = torch.Generator(device=device).manual_seed(features)
    normal = torch.randn(features, 1, generator=generator, dtype=torch.float32, device=device)
    return normal + normal.sign()


def _signed(basis_FR: Tensor) -> Tensor:
    """Each column with the sign that makes its inner product with `sign_direction` positive.

    A singular vector's sign is arbitrary, and NF4 is not symmetric about zero: without a rule, rounding errors of 1e-7
    in a gradient could flip a column and with it the whole quantized P. Every rule has a border at which it turns; of
    all sets that halve a sphere those with the smallest border are halves cut by a plane, as here. (A column turned by
    an angle t of small size changes sign with probability t / pi on average over directions.)
    """
    product = (basis_FR * sign_direction(basis_FR.shape[-2], basis_FR.device)).sum(-2, keepdim=True)
    return (basis_FR * torch.where(product < 0, -1.0, 1.0)).contiguous()


def captured_energy(gradient_OI: Tensor, basis_FR: Tensor, side: str) -> Tensor:
    """||G P||_F^2 / ||G||_F^2 (input side) or ||P^T G||_F^2 / ||G||_F^2 (output side): scalar in [0, 1]."""
    gradient, basis = gradient_OI.double(), basis_FR.double()
    projected = gradient @ basis if side == "input" else basis.T @ gradient
    return projected.square().sum() / gradient.square().sum().clamp_min(1e-300)


def subspace_overlap(rotation_RR: Tensor) -> Tensor:
    """||P_old^T P_new||_F^2 / r: 1 for the same subspace, about r / F for unrelated ones.

    Args:
        rotation_RR: P_old^T P_new (see `transport.basis_rotation`).
    """
    return rotation_RR.square().sum() / rotation_RR.shape[1]


def energy_overlap(rotation_RR: Tensor, kept_RK: Tensor) -> Tensor:
    """Of the energy that the new P keeps of a gradient, the part that lies in the old P's span.

        ||P_old^T P_new P_new^T G||_F^2 / ||P_new^T G||_F^2  ~  ||(P_old^T P_new) K||_F^2 / ||K||_F^2

    `subspace_overlap` weighs all of P_new's directions alike, so that those which hold next to nothing of the gradient
    decide it. 1 for the same subspace, about r / F for unrelated ones.

    Args:
        rotation_RR: P_old^T P_new.
        kept_RK: K, random combinations of the columns of P_new^T G (see `kept_of_sketch`).
    """
    return (rotation_RR @ kept_RK).square().sum() / kept_RK.square().sum().clamp_min(1e-30)


def _normalized(matrix: Tensor) -> Tensor:
    """Scaled to a largest entry of 1: gradients of 1e-6 would otherwise meet absolute tolerances inside LAPACK."""
    return matrix / matrix.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
