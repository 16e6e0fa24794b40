"""Every name that a setting may be: the one list of strategies, schemes, schedules and so on.

Whoever branches on such a name takes its type from here, so that mypy finds the places that a new one must reach.
"""

from __future__ import annotations

from typing import Literal

Method = Literal["loqt", "full"]
Dtype = Literal["float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]

# the method
Side = Literal["input", "output"]
SideChoice = Literal["auto", "input", "output"]
SubspaceMethod = Literal["sketch", "randomized", "svd"]
QuantScheme = Literal["nf4", "nf4_double", "fp4", "int8", "none"]
StatePolicy = Literal["keep", "reset", "transport"]
GapSchedule = Literal["exponential", "linear", "constant"]
InitialFactors = Literal["zero", "loftq"]
LowRankPath = Literal["fold", "branch"]
LowRankCompute = Literal["auto", "fold", "branch"]

# the optimizer
OptimizerName = Literal["adamw", "muon"]
OptimizerStates = Literal["float32", "int8"]
RateSchedule = Literal["cosine", "wsd", "linear", "constant"]

# ranks and memory
StrategyName = Literal["auto", "single", "ddp", "fsdp", "zero"]
Kept = Literal["nothing", "gradients", "trained"]
Offload = Literal["none", "base", "optimizer", "all"]
ZeroStage = Literal[1, 2, 3]
ZeroOffload = Literal["none", "optimizer", "parameters"]

# a run and what becomes of it
OnExisting = Literal["refuse", "archive"]
ProgressMode = Literal["auto", "on", "off"]
ExportFormat = Literal["dense", "nf4"]
