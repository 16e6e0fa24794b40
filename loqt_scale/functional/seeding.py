"""Where every random number of a run comes from: names and numbers, so that no rank or restart changes it.

    stable_seed     seeds of generators: sketches, LoftQ, rounding at random, dropout by step and rank
    isolated_rng    torch's CPU generator for a while: initial weights, chunk by chunk
    epoch_keys      the order of an epoch's sequences

The three hash, or draw, in ways of their own, which must stay: runs that go on depend on the bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import torch


def stable_seed(*parts: str | int) -> int:
    """A 63-bit seed from a tuple of strings and integers (Python's own `hash` changes from process to process)."""
    digest = blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def isolated_rng(*key: object) -> Iterator[None]:
    """Run with the CPU generator seeded from a stable hash of `key`; the global random state is back afterwards.

    Not `torch.manual_seed`, which would reseed the accelerators as well.
    """
    digest = blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(int.from_bytes(digest, "big") >> 1)
        yield


def epoch_keys(count: int, seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    """(count,) random uint64 numbers of an epoch.

    numpy promises that a bit generator's raw output stays the same from release to release, but not what a `Generator`
    makes of it.
    """
    return np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(count)
