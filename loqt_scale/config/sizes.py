"""What a GPU has, as people write it: 24GB, 24GiB."""

from __future__ import annotations

import re

from loqt_scale.errors import ConfigError, shortened

UNITS = {"gib": 2**30, "mib": 2**20, "gb": 10**9, "mb": 10**6}
# bytes of a GPU that torch does not count: the CUDA context, workspaces, fragments; an assumption
OUTSIDE = 800 * 2**20


def parse_size(text: str) -> int:
    """Bytes of "24GB" (10^9) or "24GiB" (2^30).

    Raises:
        ConfigError: It is no such size, or no more than what torch does not count of a GPU.
    """
    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{0,12})?)\s*(GiB|MiB|GB|MB)", text.strip(), flags=re.IGNORECASE)
    if found is None:
        raise ConfigError(
            f"gpu_memory is '{shortened(text)}'; write a number above 0 and a unit, e.g. 24GB (10^9 bytes) or 24GiB "
            "(2^30)"
        )
    size = int(float(found[1]) * UNITS[found[2].lower()])
    if size <= OUTSIDE:
        raise ConfigError(
            f"gpu_memory is {text}, but a GPU needs {OUTSIDE >> 20} MiB for what torch does not count (assumed); write "
            "more"
        )
    return size
