"""How a run begins or goes on: what a loop of somebody's own may have forgotten, and layers that have no P yet."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch

from loqt_scale.errors import UserError
from loqt_scale.layers import LoQTLayer
from loqt_scale.merge.placed import PlacedLayer
from loqt_scale.merge.schedule import MergeSchedule
from loqt_scale.strategies import Editing

_LOAD = "merges.load_state_dict(state), with what merges.state_dict() was when the model was saved"
ANEW = (
    "this model has merged before, but these merges begin at step 0, as those of a new run. If a run goes on here, "
    f"call {_LOAD}"
)
OVERWRITTEN = (
    "a state was loaded into the model after attach(), which had made up for quantization (loqt.init: loftq): the next "
    f"merge would take what was loaded for untrained. Call {_LOAD}; or load the model before attach()"
)


class FirstBases:
    """Which layers have no P: one that trains must not wait for a planned merge, since its B does not train until then.

    P is zero until a layer's first merge. So it is of layers that were frozen till now, and of all of them if a state
    from before the first merge is loaded (by a learning-rate finder, say), or merges go on and the model's own state
    was not loaded.

    Args:
        layers: By name.
        editing: How they are spread over ranks.
    """

    def __init__(self, layers: Mapping[str, LoQTLayer], editing: Editing) -> None:
        self._layers, self._editing, self._loads = layers, editing, _count_loads(layers)
        self._without: set[str] | None = None  # None: nobody has looked
        self._attached: tuple[int, bool, bool] | None = None  # see `expect_state`; until the first step

    def trust(self) -> None:
        """Says that all layers have a P, or a merge that is due. Local."""
        self._without, self._loads = set(), _count_loads(self._layers)

    def doubt(self) -> None:
        """Says that nothing is known. Local."""
        self._without = None

    def waiting(self) -> list[str]:
        """Names of the layers that train and have no P. Every rank, if nobody knows; else local."""
        without, loads = self._without, _count_loads(self._layers)
        if without is None or loads != self._loads:
            without = {name for name in self._layers if not self.has_basis(name)}
        self._loads, self._without = loads, without
        return [name for name, layer in self._layers.items() if name in without and layer.factor.requires_grad]

    @torch.no_grad()
    def has_basis(self, name: str) -> bool:
        """Whether a layer's P is not zero. Every rank."""
        self._editing.settle()
        return bool(PlacedLayer(self._layers[name], self._editing).basis().any())

    def have_merged(self, names: Set[str]) -> None:
        """Says which layers have taken part in a merge. Local."""
        loads = _count_loads(self._layers)
        known = self._without if loads == self._loads else None
        self._loads, self._without = loads, None if known is None else known - names
        if len(names) == len(self._layers):
            self._without = set()

    # ---- a run that goes on ------------------------------------------------------------------------------------------

    def expect_state(self, *, merged: bool, compensated: bool) -> None:
        """Has `check_beginning` look whether the states of a run that goes on were all loaded. Local.

        Args:
            merged: Whether the model had merged when merges were attached to it.
            compensated: Whether they have begun the run with P and B that make up for quantization.
        """
        self._attached = _count_loads(self._layers), merged, compensated

    def check_beginning(self, progress: Mapping[str, Any], *, known: bool) -> list[str]:
        """What to say, before the first step after `expect_state`, of a state that was not loaded. Every rank, then.

        Args:
            progress: The merges'.
            known: Whether they know of what was before.

        Raises:
            UserError: The ranks' merges are not at one place; or the next merge would undo the training.
        """
        if self._attached is None:
            return []
        loads, merged, compensated = self._attached
        loaded = self._agree(progress, _count_loads(self._layers) != loads)
        if not known and loaded and compensated:
            raise UserError(OVERWRITTEN)
        self._attached = None
        has_merged = merged or (loaded and self.has_basis(next(iter(self._layers))))
        return [ANEW] if has_merged and not known else []

    def _agree(self, progress: Mapping[str, Any], loaded: bool) -> bool:
        """Whether any rank has loaded a model's state. Every rank."""
        place = {key: progress[key] for key in ("position", "moved")}
        everyone = self._editing.comm.gather_objects((place, loaded))
        for rank, (theirs, _) in enumerate(everyone):
            if theirs != everyone[0][0]:
                raise UserError(
                    f"merges are at {everyone[0][0]} on rank 0 and at {theirs} on rank {rank}, so ranks would wait for "
                    "one another; call merges.load_state_dict(state) on every rank"
                )
        return any(each for _, each in everyone)


def make_up(schedule: MergeSchedule, bases: FirstBases, step: int, position: int | None) -> list[str]:
    """Makes a step a merge step if one before it was left out, or a layer would not train. Every rank, at times.

    Args:
        schedule: The run's merges.
        bases: Of its layers.
        step: The step that begins.
        position: The step that should begin; None: nobody knows.

    Returns:
        What to say of it.
    """
    if step in schedule:
        return []
    missed = schedule.between(position, step) if position is not None else []
    if missed:
        said = f"the merge of step {missed[-1]} follows step {step}: no step {missed[-1]} was prepared"
    elif not (waiting := bases.waiting()):
        return []
    elif position is None:
        said = f"the first merge, which belongs to step 0, follows step {step}, with which the run begins"
    else:
        said = (
            f"P of {len(waiting)} layer(s) that train is zero ({waiting[0]}, say: frozen till now, or a state from "
            f"before its first merge was loaded), so a merge follows step {step}"
        )
    schedule.require(step)
    return [said]


def _count_loads(layers: Mapping[str, LoQTLayer]) -> int:
    """How often a state dict was loaded into layers."""
    return sum(layer.loads for layer in layers.values())
