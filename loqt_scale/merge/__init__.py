"""The merge: factors folded into the quantized base, a fresh subspace, one layer at a time, every rank."""

from loqt_scale.merge.coordinator import MergeCoordinator
from loqt_scale.merge.one_layer import NUMBERS
from loqt_scale.merge.placed import InitialWeights
from loqt_scale.merge.probes import attach_probes, probe_shape
from loqt_scale.merge.report import MERGE_DIAGNOSTICS, MergeReport, StartReport
from loqt_scale.merge.subspace import AIR_BYTES, deal, wave_size

__all__ = [
    "AIR_BYTES",
    "MERGE_DIAGNOSTICS",
    "NUMBERS",
    "InitialWeights",
    "MergeCoordinator",
    "MergeReport",
    "StartReport",
    "attach_probes",
    "deal",
    "probe_shape",
    "wave_size",
]
