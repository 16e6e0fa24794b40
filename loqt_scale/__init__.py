"""LoQT (low-rank adapters for quantized training, NeurIPS 2024) on one device and on many.

The library's surface; everything is imported when it is first used, so that `loqt-scale --help` does not wait for
torch.

    convert_to_loqt    turns the linears of any model into LoQT layers, in place
    LoQTCallback       all of it in transformers' Trainer
    attach             gives a training loop of your own its merges: a MergeCoordinator
    muon               the optimizer that trains it best
    to_dense           the model with ordinary linears again; save_merged: a folder for from_pretrained
    LoQTConfig         the method's settings
    RunConfig, train   a whole training job
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loqt_scale.config import LoQTConfig, MergeConfig, QuantizationConfig, RunConfig, SubspaceConfig
    from loqt_scale.layers import LoQTLinear, convert_to_loqt
    from loqt_scale.library.attach import attach
    from loqt_scale.library.callback import LoQTCallback
    from loqt_scale.library.dense import save_merged, to_dense
    from loqt_scale.library.muon import muon
    from loqt_scale.merge import MergeCoordinator, MergeReport
    from loqt_scale.training.job import train

_HOMES = {
    "LoQTCallback": "library.callback",
    "LoQTConfig": "config",
    "LoQTLinear": "layers",
    "MergeConfig": "config",
    "MergeCoordinator": "merge",
    "MergeReport": "merge",
    "QuantizationConfig": "config",
    "RunConfig": "config",
    "SubspaceConfig": "config",
    "attach": "library.attach",
    "convert_to_loqt": "layers",
    "muon": "library.muon",
    "save_merged": "library.dense",
    "to_dense": "library.dense",
    "train": "training.job",
}

__all__ = [
    "LoQTCallback",
    "LoQTConfig",
    "LoQTLinear",
    "MergeConfig",
    "MergeCoordinator",
    "MergeReport",
    "QuantizationConfig",
    "RunConfig",
    "SubspaceConfig",
    "attach",
    "convert_to_loqt",
    "muon",
    "save_merged",
    "to_dense",
    "train",
]
__version__ = "0.1.0"


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
