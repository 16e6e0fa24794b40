"""What a merge says about itself."""

from __future__ import annotations

from dataclasses import dataclass

MERGE_DIAGNOSTICS = ("error_before", "error_after", "gradient_energy", "subspace_overlap", "update_survival")


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Args:
        step: The merge step.
        index: Its place in the schedule, from 0; a postponed merge keeps its own, unless it falls on the next one.
        seconds: Wall time of `finish` on this rank.
        sketch_bytes: Payload of what was reduced to the layers' owners before `finish`, in the backward passes.
        layers: Per layer: `error_before` and `error_after` compensation (||W - W_eff|| / ||W||), `gradient_energy`
            kept by P, `subspace_overlap` with the old P, `update_survival` (see `compensation.update_survival`); the
            last two are nan in the first merge.
    """

    step: int
    index: int
    seconds: float
    sketch_bytes: int
    layers: dict[str, dict[str, float]]

    def means(self) -> dict[str, float]:
        """Each diagnostic's mean over the layers that have it."""
        result = {}
        for key in MERGE_DIAGNOSTICS:
            values = [layer[key] for layer in self.layers.values() if layer[key] == layer[key]]
            if values:
                result[key] = sum(values) / len(values)
        return result
