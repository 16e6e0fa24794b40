"""How much of an update a merge has kept: W_eff after it, beside what was folded in.

Quantization may round small updates away. With W = W_q_old + U, U = s L(B_old), and the new effective weight W_eff,

    1 + <W_eff - W, U> / ||U||^2        1: all of U survives, 0: none

It is estimated from about `SAMPLED_ROWS` rows of a matrix, evenly spaced, the same ones on any number of ranks, or from
fewer where these are more than a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loqt_scale.functional import compensation
from loqt_scale.functional.compensation import Compensated
from loqt_scale.functional.quantization import MatrixLayout, unpack

SAMPLED_ROWS = 128  # all of a smaller matrix


class Sample(NamedTuple):
    """Every how many-th row group of a shard.

    Args:
        group_rows: Rows of a group.
        first: The first one, of this shard's.
        spacing: From each to the next. With 1 it is all of them, the matrix's last too, which may have fewer rows.
    """

    group_rows: int
    first: int
    spacing: int

    def groups(self, rows: int) -> slice:
        """Of a shard of so many rows."""
        return slice(self.first, None if self.spacing == 1 else rows // self.group_rows, self.spacing)

    def rows(self, rows_NX: Tensor) -> Tensor:
        """The rows of these groups, (n, X)."""
        if self.spacing == 1:
            return rows_NX
        whole, width = rows_NX.shape[0] // self.group_rows, rows_NX.shape[1]
        groups = rows_NX[: whole * self.group_rows].view(whole, self.group_rows, width)
        return groups[self.groups(rows_NX.shape[0])].flatten(0, 1)


def update_survival(
    weight_NI: Tensor,
    layout: MatrixLayout,
    result: Compensated,
    *,
    new_basis: Tensor,
    old_basis: Tensor,
    old_factor: Tensor,
    side: str,
    scale: float,
    first_row: int = 0,
) -> Tensor:
    """The two sums of the formula above, over the sampled rows of this shard.

    Args:
        weight_NI: This shard's rows of W, float32: whole groups.
        layout: Layout of the whole W.
        result: What became of them.
        new_basis: P as these rows need it: whole (I, r) on side input, (N, r) on side output.
        old_basis: The P from before, likewise.
        old_factor: The B from before: (N, r) on side input, whole (I, r) on side output.
        side: `input` or `output`.
        scale: s.
        first_row: Where in W the shard begins.

    Returns:
        [<W_eff - W, U>, ||U||^2], float32 (2,).
    """
    rows = min(SAMPLED_ROWS, compensation.CHUNK_VALUES // layout.cols)
    spacing = max(1, layout.groups // max(1, rows // layout.group_rows))
    spacing += spacing > 1 and spacing % 2 == 0  # odd: in step with neither heads nor experts that alternate
    sample = Sample(layout.group_rows, first=-(first_row // layout.group_rows) % spacing, spacing=spacing)
    old_left, old_right = (old_factor, old_basis) if side == "input" else (old_basis, old_factor)
    new_left, new_right = (result.factor, new_basis) if side == "input" else (new_basis, result.factor)
    update = (sample.rows(old_left) @ old_right.T).mul_(scale)
    groups = sample.groups(weight_NI.shape[0])
    scales = None if result.scales is None else result.scales[groups]
    change = unpack(result.codes[groups], scales, layout, torch.float32, rows=update.shape[0])
    change.sub_(sample.rows(weight_NI)).addmm_(sample.rows(new_left), new_right.T, alpha=scale)
    update, change = update.flatten(), change.flatten()
    return torch.stack([change @ update, update @ update])
