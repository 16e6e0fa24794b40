"""Carrying the optimizer's moments of B from one basis to the next.

B's rows are coordinates in the basis P. When a merge replaces P_old by P_new, a gradient that read g in the old
coordinates reads g R in the new ones, R = P_old^T P_new (r x r). The first moment (Muon's only one) is linear in g and
follows exactly, up to what the new subspace cannot see; for the second, E[(g R)_j^2] = sum_k E[g_k^2] R_kj^2 when the
coordinates are uncorrelated (as Fira and LDAdam do). Those of singular vectors nearly are; those of a sketch's range
(`projection.orthonormal_basis`) less so, and there AdamW's steps follow the second moment less well until it has
averaged anew. Muon has none. `keep` would read old coordinates as if they were new ones;
`reset` forgets.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import Tensor

from loqt_scale.config import StatePolicy

StateKind = Literal["first", "second", "absolute", "rows", "columns"]


def basis_rotation(old_FR: Tensor, new_FR: Tensor) -> Tensor:
    """R = P_old^T P_new, (r, r), in float32."""
    return old_FR.float().T @ new_FR.float()


def turn_state(kind: StateKind, state: Tensor, rotation_RR: Tensor) -> None:
    """Carries one optimizer state of B into the new basis, in place.

    Args:
        kind: What it is made of: `first`: gradients, exact; `second`: squares of gradients, as above (a maximum of them
            stays at least what it is the maximum of); `absolute`: magnitudes, sum_k |g_k| |R_kj|, an upper bound;
            `columns`: sums of squares over B's rows, as above. `rows`, sums over its columns, stays as it is.
        state: (..., r).
        rotation_RR: P_old^T P_new.
    """
    if kind == "rows":
        return
    rotation = rotation_RR.to(state.dtype)
    turn = {"first": rotation, "absolute": rotation.abs()}.get(kind)
    state.copy_(state @ (rotation.square() if turn is None else turn))


def carry_states(states: Iterable[tuple[StateKind, Tensor]], rotation_RR: Tensor | None, policy: StatePolicy) -> None:
    """Changes the optimizer's states of B, or of a shard of its rows, in place.

    Args:
        states: What each is made of, and its values, (rows of B on this shard, r), or a factored second moment's.
        rotation_RR: P_old^T P_new; None when there was no old basis, which resets.
        policy: `keep`, `reset` or `transport`.
    """
    if policy == "keep":
        return
    for kind, state in states:
        if policy == "reset" or rotation_RR is None:
            state.zero_()
        else:
            turn_state(kind, state, rotation_RR)


def apply_state_policy(
    first_NR: Tensor, second_NR: Tensor | None, rotation_RR: Tensor | None, policy: StatePolicy
) -> None:
    """`carry_states` of Adam's two moments, or of Muon's one (`second_NR` None)."""
    second: list[tuple[StateKind, Tensor]] = [] if second_NR is None else [("second", second_NR)]
    carry_states([("first", first_NR), *second], rotation_RR, policy)
