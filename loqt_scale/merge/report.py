"""What a merge says about itself."""

from __future__ import annotations

from dataclasses import dataclass

from loqt_scale.process.caller import warn_caller
from loqt_scale.strategies import Comm

MERGE_DIAGNOSTICS = (
    "error_before",
    "error_after",
    "gradient_energy",
    "subspace_overlap",
    "energy_overlap",
    "update_survival",
)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Args:
        step: The merge step.
        index: Its place in the schedule, from 0; a postponed merge keeps its own, unless it falls on the next one.
        seconds: Wall time of `finish` on this rank.
        sketch_bytes: Payload of what was reduced to the layers' owners before `finish`, in the backward passes.
        layers: Per layer: `error_before` and `error_after` compensation (||W - W_eff|| / ||W||), `gradient_energy`
            kept by P, `subspace_overlap` with the old P, `energy_overlap` likewise but by the gradient's energy (see
            `projection.energy_overlap`), `update_survival` (see `functional.survival`); the last three are nan in the
            first merge, and so are the errors if the weights before quantization are not known; all are of a layer that
            was kept.
        kept: Layers that were in no backward pass of any rank, and stay as they are until the next merge.
    """

    step: int
    index: int
    seconds: float
    sketch_bytes: int
    layers: dict[str, dict[str, float]]
    kept: tuple[str, ...] = ()

    def means(self) -> dict[str, float]:
        """Each diagnostic's mean over the layers that have it."""
        result = {}
        for key in MERGE_DIAGNOSTICS:
            values = [layer[key] for layer in self.layers.values() if layer[key] == layer[key]]
            if values:
                result[key] = sum(values) / len(values)
        return result


@dataclass(frozen=True)
class StartReport:
    """What a start that makes up for quantization did.

    Args:
        seconds: Wall time on this rank.
        errors: Per layer ||W - W_eff|| / ||W||: of plain quantization, and now. Empty if W is stored exactly.
    """

    seconds: float
    errors: dict[str, tuple[float, float]]

    def means(self) -> dict[str, float]:
        """`error_before` and `error_after`, means over the layers; nothing if there are none."""
        if not self.errors:
            return {}
        before, after = (sum(column) / len(self.errors) for column in zip(*self.errors.values(), strict=True))
        return {"error_before": before, "error_after": after}


def warn(comm: Comm, text: str) -> None:
    """Says something to people, once for all ranks; the warning names the program's line. Local."""
    if comm.is_main:
        warn_caller(f"LoQT: {text}")
