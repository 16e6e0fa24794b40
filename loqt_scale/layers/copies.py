"""Copies of layers, in which somebody may average weights: what every merge should look at.

A weight is W_q + s L(B), packed W_q and P beside B, and each merge gives B a new basis. So averages of B over a merge
mean nothing, and averages of packed bytes are random weights. A program that averages (`AveragedModel`, an EMA, the
soft updates of a target network) does so in a deep copy of the model. Each layer's copies are known, and from merge to
merge B of a copy should stay as it is, unless a state dict has been loaded into it, as into a target network.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from loqt_scale.layers.layer import LoQTLayer

_Seen = WeakKeyDictionary["LoQTLayer", int | None]
_COPIES: WeakKeyDictionary[LoQTLayer, _Seen] = WeakKeyDictionary()

AVERAGED = (
    "B has changed in a copy of the model while this model has merged, and nothing was loaded into the copy: averages "
    "of B, W_q and P over merges are of no use. Average ordinary weights, average = AveragedModel(to_dense(model)) and "
    "average.update_parameters(to_dense(model)); a target network that follows at once: "
    "target.load_state_dict(model.state_dict())"
)


def add_copy(layer: LoQTLayer, copy: LoQTLayer) -> None:
    """Notes a deep copy of a layer, for as long as both exist."""
    _COPIES.setdefault(layer, WeakKeyDictionary())[copy] = None


def excuse(copy: LoQTLayer) -> None:
    """Says that a copy, if it is one, may have other values than before."""
    for copies in _COPIES.values():
        if copy in copies:
            copies[copy] = None


def release(layers: Iterable[LoQTLayer]) -> None:
    """Says that layers, if they are copies, are trained by merges of their own."""
    for layer in layers:
        for copies in _COPIES.values():
            copies.pop(layer, None)


def have_changed(layer: LoQTLayer) -> bool:
    """Whether B of a copy of this layer is not what it was when this was asked before."""
    none: _Seen = WeakKeyDictionary()
    copies, changed = _COPIES.get(layer, none), False
    for copy, before in list(copies.items()):
        copies[copy] = now = _fingerprint(copy.factor)
        changed |= before not in (None, now)
    return changed


@torch.no_grad()
def _fingerprint(tensor: Tensor) -> int:
    """The sum of a tensor's bits."""
    bits = tensor.detach().contiguous().view(torch.int32 if tensor.element_size() >= 4 else torch.int16)
    return int(bits.sum(dtype=torch.int64))
