"""What ranks must agree on, and how they find out that they do not.

    before the run    settings, text, the checkpoint to go on from: compared line by line       `check_same`
    in every step     which step it is, and whether a merge follows                             `StepTag`
                      whether a rank is told to stop, cannot read its data, or wants to save    `Flags`

The last two cost no collective of their own: each is one number, which is added up over ranks with the losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from loqt_scale.errors import UserError
from loqt_scale.functional.seeding import stable_seed
from loqt_scale.strategies import Comm

_CHECKSUMS = 4096  # that many of them, each below that, add up exactly in float32


class OutOfStepError(UserError):
    """Ranks disagree on the step they are at, or on whether a merge follows it."""


def check_same(comm: Comm, lines: Sequence[str]) -> None:
    """Ranks with other settings, text or another place to go on from would train, or wait, in vain. Every rank.

    Raises:
        UserError: On every rank, unless all have the same lines; it names the first that differs.
    """
    everyone = comm.gather_objects(list(lines))
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            pairs = zip_longest(everyone[0], theirs, fillvalue="nothing")
            first, other = next((a.strip(), b.strip()) for a, b in pairs if a != b)
            raise UserError(
                f"rank 0 has {first!r}, rank {rank} has {other!r}; start all ranks with the same settings, copies of "
                "the text and the tokenizer, and with the run folder on a disk that all of them see"
            )


@dataclass(frozen=True)
class StepTag:
    """What a rank believes a step to be. Ranks at different steps send different collectives, and hang or mix data.

    Every rank adds its tag's checksum to a sum that the step makes anyway. N ranks with equal tags sum to N times the
    checksum; any other sum means that a rank is elsewhere. The sum is known only after the backward pass, but a merge
    step sends sketches *inside* its backward pass. So a tag also says whether the next step merges: a rank that
    disagrees is found out one step earlier, before the first sketch is sent.

    Args:
        step: The step, from 0.
        merges: Whether a merge follows it.
        merges_next: Whether a merge follows the next one.
    """

    step: int
    merges: bool
    merges_next: bool = False

    @property
    def checksum(self) -> int:
        """A number below 4096 that other tags are unlikely to have; 4096 of them add up exactly in float32."""
        return stable_seed("place", self.step, self.merges, self.merges_next) % _CHECKSUMS

    def check(self, total: float, ranks: int) -> None:
        """Raises OutOfStepError unless `total`, the sum over ranks, is what equal checksums add up to."""
        if total != ranks * self.checksum:
            here, following = ("a merge" if merge else "no merge" for merge in (self.merges, self.merges_next))
            raise OutOfStepError(
                f"here it is step {self.step}, after which {here} follows (after the next: {following}), but another "
                "rank is elsewhere (its own message says where); nothing was saved since. Start all ranks with the "
                "same code and settings; they go on from the last checkpoint"
            )


@dataclass(frozen=True)
class Flags:
    """What a rank has to tell the others in a step; of a sum over ranks: how many of them say so.

    Args:
        stops: It is told to stop.
        faults: It could not read its share of the step.
        saves: It asks all to save, which only rank 0 may.
    """

    stops: int
    faults: int
    saves: int

    def number(self, ranks: int) -> float:
        """All three in one number, so that numbers of all ranks can be added: digits to the base N + 1.

        Sums of up to 2895 ranks' numbers are exact in float32.
        """
        return float(self.saves + 2 * (self.stops + (ranks + 1) * self.faults))

    @classmethod
    def of_sum(cls, total: float, ranks: int) -> Flags:
        """What the ranks' numbers add up to."""
        rest, saves = divmod(int(total), 2)
        faults, stops = divmod(rest, ranks + 1)
        return cls(stops, faults, saves)
