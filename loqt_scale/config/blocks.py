"""Sizes of the blocks that 8-bit moments share a scale in (see `functional.blockwise`)."""

from __future__ import annotations

import math
from functools import cache

MOST_VALUES = 256  # a block
FEWEST_VALUES = 32  # below this the scales cost more than an eighth of the codes


@cache
def row_block(row_values: int) -> int:
    """Values of a block for rows of so many values; 0 if such rows cannot be cut into blocks worth having.

    It divides the row, so that no block leaves it: a power of two if one is large enough (32 for 96), else the largest
    divisor there is (48 for 48, 149 for 298).
    """
    power = math.gcd(row_values, MOST_VALUES)
    if power >= FEWEST_VALUES:
        return power
    sizes = range(min(row_values, MOST_VALUES), FEWEST_VALUES - 1, -1)
    return next((size for size in sizes if row_values % size == 0), 0)
