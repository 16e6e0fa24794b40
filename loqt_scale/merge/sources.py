"""Weights before quantization from what a program has of them in memory: a model, a state dict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loqt_scale.errors import UserError
from loqt_scale.merge.placed import InitialWeights

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "module.")  # what wrappers put into names


class WeightsInMemory:
    """Rows of tensors that are there. They are referred to, not copied.

    Args:
        tensors: By name of the unconverted model; a distributed tensor is gathered while it is read.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {plain_name(name): tensor for name, tensor in tensors.items()}

    def check(self, names: Iterable[str]) -> None:
        """Refuses tensors among which one is missing.

        Raises:
            UserError: Its name, and what to write.
        """
        missing = next((name for name in names if name not in self._tensors), None)
        if missing is not None:
            raise UserError(
                f"initial_weights have no {missing}; take them before the conversion: before = model.state_dict(), "
                "then convert_to_loqt(model, config), and give initial_weights=before"
            )

    def keep(self, names: Iterable[str]) -> None:
        """Lets go of all other tensors."""
        kept = set(names)
        self._tensors = {name: tensor for name, tensor in self._tensors.items() if name in kept}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `InitialWeights.rows`. Every rank, of distributed tensors."""
        tensor: Any = self._tensors[name].detach()
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        return whole[start:stop].to(torch.float32, copy=True)


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for word in WRAPPERS[:2]:
        name = name.replace(word, "")
    return name.removeprefix(WRAPPERS[2])


def as_initial_weights(given: Any, names: Iterable[str]) -> InitialWeights | None:
    """What `initial_weights` may be, as a source of rows.

    Args:
        given: A source already, an unconverted model, a state dict; None.
        names: Of the parameters that will be asked for.

    Raises:
        UserError: Anything else, or a layer's weight is not there.
    """
    if given is None or (hasattr(given, "rows") and not isinstance(given, nn.Module)):
        source: InitialWeights | None = given
        return source
    if isinstance(given, nn.Module):
        given = dict(given.named_parameters(remove_duplicate=False))
    if isinstance(given, Mapping):
        found = WeightsInMemory(given)
        found.check(names)
        return found
    raise UserError(
        f"initial_weights is a {type(given).__name__}; give a state dict or an unconverted model (attach: or a folder)"
    )
