"""Numbers as people read them: 12.3k, 1.50 GiB, 1h02m."""

from __future__ import annotations

import math
from collections.abc import Iterable


def perplexity(loss: float) -> float:
    """exp(loss) of a mean cross-entropy in nats; infinity where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def format_perplexity(loss: float) -> str:
    """Perplexity of a mean cross-entropy in nats: `33.32`, `1.2e+04`."""
    value = perplexity(loss)
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def format_span(values: Iterable[int]) -> str:
    """The least and the greatest of some numbers: `32 to 96`, or `64` where all are equal."""
    found = sorted(values)
    return str(found[0]) if found[0] == found[-1] else f"{found[0]} to {found[-1]}"


def format_count(value: float) -> str:
    """A count with a decimal suffix: `950`, `12.3k`, `1.50M`."""
    if not math.isfinite(value):
        return str(value)
    scaled, suffix = float(value), ""
    for suffix in ("", "k", "M", "G", "T"):
        if abs(scaled) < 999.5 or suffix == "T":
            break
        scaled /= 1000.0
    if suffix == "":
        return f"{scaled:.3g}"
    return f"{scaled:.0f}{suffix}" if abs(scaled) >= 100 else f"{scaled:.3g}{suffix}"


def format_bytes(value: float) -> str:
    """A number of bytes with a binary suffix: `512 B`, `1.50 GiB`."""
    scaled, unit = float(value), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(scaled) < 1024.0 or unit == "TiB":
            break
        scaled /= 1024.0
    return f"{scaled:.0f} B" if unit == "B" else f"{scaled:.2f} {unit}"


def format_duration(seconds: float) -> str:
    """A time in its two largest units: `42s`, `3m05s`, `1h02m`, `2d03h`; `?` if not finite."""
    if not math.isfinite(seconds):
        return "?"
    total = max(0, round(seconds))
    for size, unit, lower, lower_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if total >= size:
            return f"{total // size}{unit}{total % size // lower:02d}{lower_unit}"
    return f"{total}s"
