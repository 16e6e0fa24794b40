"""Whether an optimizer holds what it should train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.optim import LBFGS, Muon, Optimizer

from loqt_scale.errors import UserError

_MAKE = "optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=...)"


def parameters_of(*optimizers: Optimizer) -> list[Tensor]:
    """What optimizers update, of all their groups."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def check_held(factors: Mapping[str, Tensor], held: Iterable[Tensor], then: str = "") -> None:
    """Refuses factors that train and that no optimizer holds.

    Args:
        factors: By layer's name; those that require no gradient may be anywhere.
        held: What the optimizer updates.
        then: The line that follows the optimizer's.

    Raises:
        UserError: The lines to write.
    """
    ids = {id(parameter) for parameter in held}
    missing = [name for name, factor in factors.items() if factor.requires_grad and id(factor) not in ids]
    if missing:
        lines = "\n    ".join(filter(None, ["convert_to_loqt(model, config)", _MAKE, then]))
        raise UserError(
            f"the optimizer does not hold the factors of {len(missing)} of {len(factors)} LoQT layers ({missing[0]}, "
            "say), which would never train: was it made before convert_to_loqt, before fully_shard or "
            f"before load_state_dict(assign=True)? Make it after them:\n    {lines}"
        )


def check_no_lbfgs(factors: Iterable[Tensor], optimizers: Iterable[Optimizer]) -> None:
    """Refuses LBFGS for factors: its history is of all parameters together, in bases that merges replace.

    Raises:
        UserError: What to write instead.
    """
    ids = {id(factor) for factor in factors}
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS) and any(id(parameter) in ids for parameter in parameters_of(optimizer)):
            raise UserError(
                "torch.optim.LBFGS keeps a history of all its parameters together, which a merge cannot carry into a "
                "new subspace; train the factors by AdamW (which takes a closure, too)"
            )


def check_no_muon_of_experts(experts: Mapping[str, Tensor], optimizers: Iterable[Optimizer]) -> None:
    """Refuses torch's Muon for factors that hold the matrices of several experts, which it would take for one.

    Args:
        experts: Their factors, by layer's name.
        optimizers: Of the run.

    Raises:
        UserError: What to write instead.
    """
    for optimizer in optimizers:
        ids = {id(parameter) for parameter in parameters_of(optimizer)} if isinstance(optimizer, Muon) else set()
        taken = [name for name, factor in experts.items() if id(factor) in ids]
        if taken:
            raise UserError(
                f"torch.optim.Muon holds the factor of {taken[0]}, in which the matrices of several experts lie one "
                "below the other: it would take them for one. Give it the other factors, and these to an AdamW: "
                "attach(model, [muon, adamw], config)"
            )
