"""How one training step, and one merge, is spread over ranks: single, ddp, fsdp and zero behind one protocol."""

from torch.distributed.distributed_c10d import Store

from loqt_scale.strategies.base import DTYPES, Channel, Reducer, Strategy
from loqt_scale.strategies.create import create_strategy, resolve_device, resolve_strategy
from loqt_scale.strategies.offload import is_offloaded
from loqt_scale.strategies.rendezvous import StoreLine, open_store
from loqt_scale.strategies.roll_call import LostRankError, RollCall, StoppedElsewhere

__all__ = [
    "DTYPES",
    "Channel",
    "LostRankError",
    "Reducer",
    "RollCall",
    "StoppedElsewhere",
    "Store",
    "StoreLine",
    "Strategy",
    "create_strategy",
    "is_offloaded",
    "open_store",
    "resolve_device",
    "resolve_strategy",
]
