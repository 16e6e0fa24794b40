"""Seeds that depend on names and numbers only: the same on every rank, in every process, on every run."""

from __future__ import annotations

from hashlib import blake2b


def stable_seed(*parts: str | int) -> int:
    """A 63-bit seed from a tuple of strings and integers (Python's own `hash` changes from process to process)."""
    digest = blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
