"""Carrying the optimizer's moments of B from one basis to the next.

B's rows are coordinates in the basis P. When a merge replaces P_old by P_new, a gradient that read g in the old
coordinates reads g R in the new ones, R = P_old^T P_new (r x r). The first moment (Muon's only one) is linear in g and
follows exactly, up to what the new subspace cannot see; for the second, E[(g R)_j^2] = sum_k E[g_k^2] R_kj^2 when the
coordinates are uncorrelated (as Fira and LDAdam do). `keep` would read old coordinates as if they were new ones;
`reset` forgets.
"""

from __future__ import annotations

from torch import Tensor

from loqt_scale.config import StatePolicy


def basis_rotation(old_FR: Tensor, new_FR: Tensor) -> Tensor:
    """R = P_old^T P_new, (r, r), in float32."""
    return old_FR.float().T @ new_FR.float()


def apply_state_policy(
    first_NR: Tensor, second_NR: Tensor | None, rotation_RR: Tensor | None, policy: StatePolicy
) -> None:
    """Changes the moments of B, or of a shard of its rows, in place.

    Args:
        first_NR: First moment, (rows of B on this shard, r).
        second_NR: Second moment, same shape; None: the optimizer has none.
        rotation_RR: P_old^T P_new; None when there was no old basis, which resets.
        policy: `keep`, `reset` or `transport`.
    """
    if policy == "keep":
        return
    moments = [moment for moment in (first_NR, second_NR) if moment is not None]
    if policy == "reset" or rotation_RR is None:
        for moment in moments:
            moment.zero_()
        return
    rotation = rotation_RR.to(first_NR.dtype)
    for moment, turn in zip(moments, (rotation, rotation.square()), strict=False):
        moment.copy_(moment @ turn)
