"""Every setting of a run, as frozen dataclasses.

A run is one `RunConfig`. It is read from YAML plus dotted overrides (`--loqt.rank 128`, see `cli.py`), checked here,
and saved as `config.yaml` in the run folder. Three rules keep it readable:

* a setting exists once, and its docstring line is what `--help` prints;
* an algorithm is picked by name (a `Literal`), never by a flag;
* a combination that cannot work raises `ConfigError` naming the key and what to write instead, before anything is
  allocated.
"""

from loqt_scale.config.groups import (
    CheckpointConfig,
    DataConfig,
    Kept,
    ModelConfig,
    Offload,
    OptimConfig,
    OptimizerName,
    OptimizerStates,
    ParallelConfig,
    RateSchedule,
    Strategy,
    TrainConfig,
)
from loqt_scale.config.method import (
    GapSchedule,
    LoQTConfig,
    LowRankCompute,
    MergeConfig,
    QuantizationConfig,
    QuantScheme,
    Side,
    StatePolicy,
    SubspaceConfig,
    SubspaceMethod,
)
from loqt_scale.config.run import Method, RunConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "GapSchedule",
    "Kept",
    "LoQTConfig",
    "LowRankCompute",
    "MergeConfig",
    "Method",
    "ModelConfig",
    "Offload",
    "OptimConfig",
    "OptimizerName",
    "OptimizerStates",
    "ParallelConfig",
    "QuantScheme",
    "QuantizationConfig",
    "RateSchedule",
    "RunConfig",
    "Side",
    "StatePolicy",
    "Strategy",
    "SubspaceConfig",
    "SubspaceMethod",
    "TrainConfig",
]
