"""How one training run is spread over ranks. But for checkpoints and the wire counter, only this package knows
torch.distributed and DeepSpeed.

What a strategy is made of, each in a module of its own: `comm`, `placement`, `step`, `editing` (`base` has the whole)

    SINGLE   single.py                one process; `offload.py`: some of it in the host's memory
    DDP      ddp.py                   everything replicated, gradients all-reduced
    FSDP     fsdp.py                  every parameter sharded on dim 0, gathered around its use; `hybrid.py`: in groups
    ZERO     zero/strategy.py         the model in a DeepSpeed engine

`registry` finds them, and other packages', by name; `create` makes the one that a run names. How ranks meet and notice
that one is lost: `rendezvous`, `roll_call`. To add a strategy: docs/strategies.md.
How somebody else has spread a model, for loops of one's own: `adopt`.
"""

from torch.distributed.distributed_c10d import Store

from loqt_scale.strategies.adopt import Adopted, adopt, alone, place, replicas, unwrapped, unwrapped_optimizers
from loqt_scale.strategies.base import DTYPES, Strategy
from loqt_scale.strategies.comm import Channel, Comm, Reducer, SingleComm
from loqt_scale.strategies.create import create_strategy, resolve_device, resolve_strategy
from loqt_scale.strategies.ddp import DDP
from loqt_scale.strategies.editing import Editing, EditStates, ReplicaEditing, ShardEditing
from loqt_scale.strategies.fsdp import FSDP, FSDPPlacement, FSDPStep
from loqt_scale.strategies.fsdp_bytes import packed_bytes_may_be_sharded
from loqt_scale.strategies.fsdp_model import vocabulary_layers
from loqt_scale.strategies.hybrid import HybridEditing
from loqt_scale.strategies.offload import is_offloaded
from loqt_scale.strategies.placement import Placement, Replicated
from loqt_scale.strategies.process_group import GroupComm
from loqt_scale.strategies.registry import StrategyKind, StrategyRequest, find_strategy, register_strategy
from loqt_scale.strategies.rendezvous import StoreLine, open_store
from loqt_scale.strategies.roll_call import LostRankError, RollCall, StoppedElsewhere
from loqt_scale.strategies.single import SINGLE, single_process
from loqt_scale.strategies.step import OptimizerStep, Step
from loqt_scale.strategies.whole import whole_shape
from loqt_scale.strategies.zero.adopted import engine_of
from loqt_scale.strategies.zero.strategy import ZERO

__all__ = [
    "DDP",
    "DTYPES",
    "FSDP",
    "SINGLE",
    "ZERO",
    "Adopted",
    "Channel",
    "Comm",
    "EditStates",
    "Editing",
    "FSDPPlacement",
    "FSDPStep",
    "GroupComm",
    "HybridEditing",
    "LostRankError",
    "OptimizerStep",
    "Placement",
    "Reducer",
    "ReplicaEditing",
    "Replicated",
    "RollCall",
    "ShardEditing",
    "SingleComm",
    "Step",
    "StoppedElsewhere",
    "Store",
    "StoreLine",
    "Strategy",
    "StrategyKind",
    "StrategyRequest",
    "adopt",
    "alone",
    "create_strategy",
    "engine_of",
    "find_strategy",
    "is_offloaded",
    "open_store",
    "packed_bytes_may_be_sharded",
    "place",
    "register_strategy",
    "replicas",
    "resolve_device",
    "resolve_strategy",
    "single_process",
    "unwrapped",
    "unwrapped_optimizers",
    "vocabulary_layers",
    "whole_shape",
]
