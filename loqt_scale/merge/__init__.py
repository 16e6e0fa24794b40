"""The merge: factors folded into the quantized base, a fresh subspace, one layer at a time, every rank.

Read `coordinator`, which a loop calls, then `model_merge`, what it calls on a merge step, then

what a loop does    schedule (which steps merge), order (of calls), beginning, settings (does a run go on as it
                    was), attached (how the model lies on ranks), factor_updates (by which optimizers)
the whole model     begun (a merge that an error has interrupted) -> turns (of replicas)
the new P           probes -> collection -> basis, led by `subspace`
the layer           one_layer, of a mixture's experts `experts`; placed (its rows here), diagnostics ->
                    report
the first merge     initial_weights (those before quantization), initial_checks (are they this model's), start
                    (`loqt.init`)
"""

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
