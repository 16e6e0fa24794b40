"""How the model of a coordinator is spread over ranks: as it was told, or as is found; and what is said of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loqt_scale.errors import UserError, require_kind
from loqt_scale.layers import loqt_layers
from loqt_scale.optim import StreamedAdamW
from loqt_scale.strategies import Adopted, Editing, adopt, unwrapped, unwrapped_optimizers


def found_or_given(model: nn.Module, optimizer: Any, editing: Editing | None) -> Adopted:
    """Model and optimizers without wrappers, and how they are spread. Every rank.

    Args:
        model: Converted, or what wraps it.
        optimizer: One, or several.
        editing: What counts, if it is given.

    Raises:
        UserError: There is no LoQT layer, or see `strategies.adopt`.
    """
    if editing is not None:
        require_kind(editing, Editing, "editing", "give what loqt_scale.strategies.replicas or alone returns")
    if next(loqt_layers(model), None) is None:
        raise UserError("the model has no LoQT layer; call convert_to_loqt(model, config) first")
    if editing is None:
        return adopt(model, optimizer)
    return Adopted("as given", unwrapped(model), unwrapped_optimizers(optimizer), editing)


def warn_of_rounding(factors: Mapping[str, Tensor], editing: Editing, optimizers: Iterable[Optimizer]) -> None:
    """Says it if factors of 16 bits are updated as they are. Local."""
    short = {factor.dtype for factor in factors.values()} & {torch.bfloat16, torch.float16}
    if short and not editing.keeps_masters and not all(isinstance(each, StreamedAdamW) for each in optimizers):
        dtype = str(short.pop()).removeprefix("torch.")
        warnings.warn(
            f"LoQT: the factors are {dtype} and their optimizer keeps no float32 copies of them: it rounds away every "
            f"update smaller than {'1/256' if dtype == 'bfloat16' else '1/2048'} of a value. Convert a float32 model, "
            "and have the forward pass run in 16 bits: model.float() before convert_to_loqt, then "
            f"torch.autocast(device_type, dtype=torch.{dtype}) around it",
            stacklevel=4,
        )
