"""Every setting of a run, as frozen dataclasses.

A run is one `RunConfig`. It is read from YAML plus dotted overrides (`--loqt.rank 128`, see `cli.py`), checked here,
and saved as `config.yaml` in the run folder. Three rules keep it readable:

* a setting exists once, and its docstring line is what `--help` prints;
* an algorithm is picked by name (a `Literal`), never by a flag;
* a combination that cannot work raises `ConfigError` naming the key and what to write instead, before anything is
  allocated.
"""

from loqt_scale.config.choices import (
    Device,
    Dtype,
    ExportFormat,
    GapSchedule,
    InitialFactors,
    Kept,
    LowRankCompute,
    LowRankPath,
    Method,
    Offload,
    OnExisting,
    OptimizerName,
    OptimizerStates,
    ProgressMode,
    QuantScheme,
    RateSchedule,
    Side,
    SideChoice,
    StatePolicy,
    StrategyName,
    SubspaceMethod,
    ZeroOffload,
    ZeroStage,
)
from loqt_scale.config.data import DataConfig
from loqt_scale.config.groups import (
    CheckpointConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from loqt_scale.config.method import LoQTConfig, MergeConfig, QuantizationConfig, SubspaceConfig
from loqt_scale.config.metrics import MetricsConfig, ProfileConfig
from loqt_scale.config.run import RunConfig
from loqt_scale.config.sources import SourceConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "Device",
    "Dtype",
    "ExportFormat",
    "GapSchedule",
    "InitialFactors",
    "Kept",
    "LoQTConfig",
    "LowRankCompute",
    "LowRankPath",
    "MergeConfig",
    "Method",
    "MetricsConfig",
    "ModelConfig",
    "Offload",
    "OnExisting",
    "OptimConfig",
    "OptimizerName",
    "OptimizerStates",
    "ParallelConfig",
    "ProfileConfig",
    "ProgressMode",
    "QuantScheme",
    "QuantizationConfig",
    "RateSchedule",
    "RunConfig",
    "Side",
    "SideChoice",
    "SourceConfig",
    "StatePolicy",
    "StrategyName",
    "SubspaceConfig",
    "SubspaceMethod",
    "TrainConfig",
    "ZeroOffload",
    "ZeroStage",
]
