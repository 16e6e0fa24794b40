"""Layers are changed in turns: in each, every replica finds what becomes of one layer, and hands it on to the others.

With one replica (all strategies but HSDP) a turn is a layer. With R of them a layer is changed by the replica of its
owner, the rank that has found its P:

    replica 0    find layer a | a, b and c are handed on, from whoever has found them | find d | ...
    replica 1    find layer b |                                                      | find e |
    replica 2    find layer c |                                                      | find f |

Nothing is changed while layers are found. Before anything is handed on, all ranks learn what was found, and whether
somebody could not: then all of them raise, and no layer of the turn has been changed anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from math import prod

import torch
from torch import Tensor

from loqt_scale.functional.compensation import Compensated
from loqt_scale.functional.loftq import Packed
from loqt_scale.layers import LoQTLayer
from loqt_scale.merge.initial_weights import of_layer
from loqt_scale.merge.placed import InitialWeights, PlacedLayer
from loqt_scale.strategies import Editing

FAILED, KEPT, NEW, TURNED = range(4)  # what becomes of a matrix; as NEW, but its old P is turned into the new one


@dataclass(frozen=True)
class Found:
    """W_q, P and B: found in one replica, where each rank has its rows.

    Args:
        packed: Codes and scales of the whole P.
        result: W_q and B.
        rotations: P_old^T P_new of the matrices that are `TURNED`, (T, r, r); None: nobody needs them.
    """

    packed: Packed
    result: Compensated
    rotations: Tensor | None = None


@dataclass(frozen=True)
class Change:
    """What becomes of a layer.

    Args:
        fates: Of each of its matrices (one, or its experts): `KEPT`, `NEW` or `TURNED`.
        numbers: What is said of it, float32, on the device; of this rank's rows.
        found: Its tensors; None if all is kept, or another replica has found them.
    """

    fates: Sequence[int]
    numbers: Tensor
    found: Found | None = None

    @property
    def changes(self) -> bool:
        """Whether anything is not kept."""
        return any(fate != KEPT for fate in self.fates)


Find = Callable[[str, InitialWeights | None], Change]
Finish = Callable[[str, int, Change], object]


def in_turns(
    layers: Mapping[str, LoQTLayer],
    owners: Mapping[str, int],
    source: InitialWeights | None,
    editing: Editing,
    *,
    numbers: int,
    find: Find,
    finish: Finish,
) -> None:
    """Has layers changed. Every rank.

    Args:
        layers: By name.
        owners: Rank that has found the P of each that is to be changed, in the order in which they should be.
        source: The weights before quantization, if they are known.
        editing: How the model is spread.
        numbers: How many `Change.numbers` there are.
        find: Finds what becomes of a layer and changes nothing; called by all ranks of one replica.
        finish: Called on all ranks, one layer after the other, with the replica that has found it and what becomes of
            it, once W_q, P and B are stored.

    Raises:
        Exception: What `find` raised here.
        RuntimeError: What it raised in another replica. No layer of that turn has been changed.
    """
    for turn in turns(layers, owners, editing):
        here: Callable[[], Change] | None = None
        for name, replica in turn.items():
            weights = None if source is None else of_layer(source, name, layers[name])
            if replica == editing.replica:
                here = partial(find, name, weights)
            del weights
        for name, change in _find_together(layers, turn, here, editing, numbers).items():
            _store(layers[name], turn[name], change, editing)
            finish(name, turn[name], change)


def turns(layers: Mapping[str, LoQTLayer], owners: Mapping[str, int], editing: Editing) -> list[dict[str, int]]:
    """The layers of each turn, and the replica that finds each.

    Large layers come first, so that those of a turn are alike; with one replica they keep their order.
    """
    if editing.replicas == 1:
        return [{name: 0} for name in owners]
    queues: list[list[str]] = [[] for _ in range(editing.replicas)]
    for name in sorted(owners, key=lambda name: -prod(layers[name].weight_shape())):
        queues[editing.replica_of(owners[name])].append(name)
    return [{name: index for index, name in enumerate(turn) if name is not None} for turn in zip_longest(*queues)]


def _find_together(
    layers: Mapping[str, LoQTLayer],
    turn: Mapping[str, int],
    here: Callable[[], Change] | None,
    editing: Editing,
    numbers: int,
) -> dict[str, Change]:
    """What becomes of the layers of a turn; `here` finds this replica's, if it has one. Every rank."""
    if editing.replicas == 1:
        assert here is not None
        return {name: here() for name in turn}
    found, error = _tried(here)
    mine = {name: found if replica == editing.replica else None for name, replica in turn.items()}
    heads = {name: _head(layers[name], change, numbers, editing.device) for name, change in mine.items()}
    for name, head in heads.items():
        editing.hand_on(head, turn[name])
    fates = _read_fates(heads, numbers)
    if failed := [name for name, each in fates.items() if FAILED in each]:
        _raise_together(error, failed[0], editing)
    return {name: change or Change(fates[name], heads[name][:numbers]) for name, change in mine.items()}


def _tried(here: Callable[[], Change] | None) -> tuple[Change | None, Exception | None]:
    try:
        return None if here is None else here(), None
    except Exception as error:  # the others wait
        return None, error


def _head(layer: LoQTLayer, found: Change | None, numbers: int, device: torch.device) -> Tensor:
    """Numbers and fates as one row of float32: those of a layer that was found here, else room for them."""
    matrices = layer.spec.expert_count
    if found is None:  # nobody has found it, if it stays like that
        return torch.full((numbers + matrices,), float(FAILED), dtype=torch.float32, device=device)
    return torch.cat([found.numbers, found.numbers.new_tensor(found.fates)])


def _read_fates(heads: Mapping[str, Tensor], numbers: int) -> dict[str, list[int]]:
    """Of all layers of a turn: the host reads once."""
    every = torch.cat([head[numbers:] for head in heads.values()]).int().cpu()
    parts = every.split([len(head) - numbers for head in heads.values()])
    return {name: part.tolist() for name, part in zip(heads, parts, strict=True)}


def _raise_together(error: Exception | None, name: str, editing: Editing) -> None:
    """Somebody could not find their layer: that one's error, or words of it. Every rank."""
    told = editing.gather_from_replicas(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    raise RuntimeError(f"another replica could not merge {name}: {next((words for words in told if words), '')}")


def _store(layer: LoQTLayer, replica: int, change: Change, editing: Editing) -> None:
    """Replaces W_q, P and B. Every rank."""
    if not change.changes:
        return
    if change.found is not None:
        placed = PlacedLayer(layer, editing)
        placed.store_basis(*change.found.packed)
        placed.store(change.found.result)
    for parameter in layer.merged_parameters():
        editing.hand_on(parameter, replica)
