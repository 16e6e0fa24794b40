"""What a merge says of one matrix, a layer's or an expert's: `MERGE_DIAGNOSTICS`, as far as they are known."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loqt_scale.functional.compensation import Compensated
from loqt_scale.functional.low_rank_linear import LowRankSpec
from loqt_scale.functional.projection import energy_overlap, subspace_overlap
from loqt_scale.functional.survival import update_survival


def describe_merge(
    spec: LowRankSpec,
    weight_NI: Tensor,
    result: Compensated,
    *,
    old_FR: Tensor,
    new_FR: Tensor,
    rows_of_basis: Callable[[Tensor], Tensor],
    old_factor: Tensor,
    energy: Tensor | None,
    kept: Tensor,
    rotation: Tensor,
    first_row: int,
    first: bool,
    is_known: bool,
) -> Tensor:
    """A matrix's diagnostics, nan where there is nothing to say. Local.

    Args:
        spec: The matrix's own.
        weight_NI: This rank's rows of what was merged.
        result: What became of it.
        old_FR: The P from before.
        new_FR: The new one.
        rows_of_basis: What of a P belongs to this rank's rows (see `PlacedLayer.rows_of_basis`).
        old_factor: The B from before, as this rank's rows need it.
        energy: Share of the gradient in the new P; None: there was no gradient.
        kept: Of that gradient, as `FoundBasis` has it.
        rotation: P_old^T P_new.
        first_row: Where in the matrix this rank's rows begin.
        first: Whether this was its first merge, before which there is no update and no P to compare with.
        is_known: Whether the weights before quantization are.

    Returns:
        (7,): the first five diagnostics, then this shard's two sums for the survival of updates.
    """
    sums = update_survival(
        weight_NI,
        spec.base,
        result,
        new_basis=rows_of_basis(new_FR),
        old_basis=rows_of_basis(old_FR),
        old_factor=torch.zeros_like(old_factor) if first else old_factor,
        side=spec.side,
        scale=spec.scale,
        first_row=first_row,
    )
    nan = result.error.new_full((), float("nan"))
    lost = first and not is_known and not spec.base.kind.exact  # errors of what is not known any more
    errors = (nan, nan) if lost else (result.error_before, result.error)
    overlap = nan if first else subspace_overlap(rotation)
    weighted = nan if first or energy is None else energy_overlap(rotation, kept)
    return torch.stack([*errors, nan if energy is None else energy, overlap, weighted, *sums])
