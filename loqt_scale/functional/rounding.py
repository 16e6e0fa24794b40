"""Rounding float32 to bfloat16 at random, so that on average nothing is lost.

A weight in bfloat16 has 8 bits of mantissa: an update below 1/512 of it rounds to nothing, every time. Rounded up with
the probability of what is cut off, it is right on average: E[round(x)] = x.

The noise is no generator's state but a hash of (seed, index of the element): the same on every rank and for any shard.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_BITS = 0xFFFF
_STRIDE = 0x9E3779B97F4A7C15  # of the hash, from index to index


def seed_of_update(seed: int | Tensor, count: Tensor) -> Tensor:
    """A seed of its own for each count, whole numbers in a tensor that never leaves its device; int64, of its shape.

    Args:
        seed: One for all, or int64 of the counts' shape.
        count: Any shape.
    """
    return _hash(count.to(torch.int64), seed)


def seed_from(seed: Tensor, first_index: int) -> Tensor:
    """The seed with which the element of index 0 has the noise that `seed` gives to `first_index`; int64 scalar."""
    return seed + _signed(first_index * _STRIDE) if first_index else seed


def stochastic_bfloat16(values: Tensor, *, seed: int | Tensor, first_index: int) -> Tensor:
    """Rounds at random.

    Args:
        values: float32, any shape, contiguous.
        seed: Same seed and index, same noise. A tensor: int64 scalar on the values' device.
        first_index: Index of the first element in the whole tensor of which these are a part.

    Returns:
        bfloat16, one of the two neighbours of each value; what is not finite stays as it is.
    """
    index = torch.arange(first_index, first_index + values.numel(), device=values.device)
    if torch.compiler.is_compiling():
        index = index & ((1 << 63) - 1)  # changes nothing; without it the compiler takes the hash for an address
    noise = _hash(index, seed)
    bits = values.reshape(-1).view(torch.int32) + (noise & _LOW_BITS).to(torch.int32)
    rounded = (bits & ~_LOW_BITS).view(torch.float32).reshape(values.shape)
    return torch.where(torch.isfinite(values), rounded, values).to(torch.bfloat16)


def _hash(index: Tensor, seed: int | Tensor) -> Tensor:
    """48 well mixed bits an index (splitmix64, Steele et al. 2014), in int64 that wraps around on the way."""
    state = index * _signed(_STRIDE) + (seed if isinstance(seed, Tensor) else _signed(seed))
    state = (state ^ _shift(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shift(state, 27)) * _signed(0x94D049BB133111EB)
    return _shift(state ^ _shift(state, 31), 16)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Right, filling with zeros (torch fills with the sign)."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 of the same bits."""
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value
