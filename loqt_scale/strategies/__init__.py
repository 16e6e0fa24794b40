"""How one training step, and one merge, is spread over ranks: single, ddp, fsdp and zero behind one protocol."""

from loqt_scale.strategies.base import DTYPES, Channel, Reducer, Strategy, shard_range
from loqt_scale.strategies.create import create_strategy, resolve_device, resolve_strategy
from loqt_scale.strategies.offload import is_offloaded
from loqt_scale.strategies.process_group import launched_world_size

__all__ = [
    "DTYPES",
    "Channel",
    "Reducer",
    "Strategy",
    "create_strategy",
    "is_offloaded",
    "launched_world_size",
    "resolve_device",
    "resolve_strategy",
    "shard_range",
]
