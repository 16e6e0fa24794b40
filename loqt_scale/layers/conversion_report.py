"""What a conversion did: which layers became low-rank, how much of the model they hold, what was left and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

NAMES_SHOWN = 4
# reasons: what everybody expects, or has asked for
VECTORS, EMBEDDING, HEAD = "no matrices", "an embedding", "the model's head"
EXCLUDED, NOT_TARGETED = "in loqt.exclude_modules", "not in loqt.target_modules"
EXPECTED = (VECTORS, EMBEDDING, HEAD, EXCLUDED, NOT_TARGETED)


@dataclass(frozen=True)
class Left:
    """A parameter that trains, or rests, as it did before.

    Args:
        name: The layer's, or the parameter's where it is no layer's `weight`.
        why: The reason, e.g. "an embedding".
        values: Its elements.
    """

    name: str
    why: str
    values: int


class ConversionReport(list[str]):
    """The names of the converted layers, as a list; printed, it says what was left and why.

    Args:
        names: The converted layers, in module order.
        converted_values: Elements of the weights that they hold.
        left: All other parameters; vectors (norms, biases) are one entry.

    Attributes:
        converted_values: As above.
        left: As above.
    """

    def __init__(self, names: Iterable[str], converted_values: int, left: Iterable[Left]) -> None:
        super().__init__(names)
        self.converted_values, self.left = converted_values, tuple(left)

    @property
    def values(self) -> int:
        """Elements of all distinct parameters, before the conversion."""
        return self.converted_values + sum(left.values for left in self.left)

    @property
    def share(self) -> float:
        """Converted elements among all, 0 to 1."""
        return self.converted_values / max(self.values, 1)

    @property
    def surprising_share(self) -> float:
        """Elements among all, 0 to 1, that were left for another reason than that they always are, or by request."""
        return sum(left.values for left in self.left if left.why not in EXPECTED) / max(self.values, 1)

    def reasons(self) -> dict[str, list[Left]]:
        """What was left, by reason; the reason that holds most elements comes first."""
        groups: dict[str, list[Left]] = {}
        for left in self.left:
            groups.setdefault(left.why, []).append(left)
        return dict(sorted(groups.items(), key=lambda item: -_values(item[1])))

    def __str__(self) -> str:
        lines = [
            f"LoQT: {len(self)} layers hold {self.converted_values:,} of the {self.values:,} parameters "
            f"({self.share:.0%})"
        ]
        for why, left in self.reasons().items():
            lines.append(f"  left {_values(left) / max(self.values, 1):6.1%}  {why}: {_shown(left)}")
        return "\n".join(lines)


def _values(left: Iterable[Left]) -> int:
    return sum(item.values for item in left)


def _shown(left: list[Left]) -> str:
    names = ", ".join(item.name for item in left[:NAMES_SHOWN])
    return names if len(left) <= NAMES_SHOWN else f"{names} and {len(left) - NAMES_SHOWN} more"
