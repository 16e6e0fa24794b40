"""Several texts in one run: which of them each sequence of a step comes from.

Sequences are mixed, not documents: each holds T tokens of one text, so shares of sequences are shares of tokens. Which
text, and how much of it has been read, is a function of (seed, step) and of the weights:

    how many    step s puts the points u_s, u_s + 1, ... u_s + B - 1 on a line of length B, of which each text has its
                share: as many points as fall into it (systematic sampling). u_0 is drawn from the seed, u_s = u_0 + s
                times the golden ratio, modulo 1: so a step is within one sequence of a text's share, and s steps
                together are within a few, whatever s is.
    where       the places in the batch are shuffled for each step, so that every logical stream of a streamed data set
                gets its turn, on every rank.

A text that is through begins again, in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loqt_scale.config.sources import Shares
from loqt_scale.data.batches import Batch, StoredSequences, TrainStream, check_range, epoch_order
from loqt_scale.data.packing import Int64Array
from loqt_scale.errors import UserError
from loqt_scale.functional.seeding import stable_seed

MOST_EPOCHS = 4
"""A text that is read more often is told of: new text is worth more then (Muennighoff et al., arXiv 2305.16264)."""

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio
_STEPS_AT_ONCE = 2**16  # whose counts are added up in one pass
_SUMS_KEPT = 4


def repeated_often(name: str, how: str) -> str:
    """A line on a source that is read more than `MOST_EPOCHS` times, and what to do."""
    return (
        f"data.sources, '{name}' {how}; beyond {MOST_EPOCHS} times new text helps more: add files, or write "
        "a smaller weight"
    )


@contextmanager
def named_source(name: str) -> Iterator[None]:
    """Context of what concerns one source: errors for people begin with its name."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"data.sources, '{name}': {error}") from error


class Mixing:
    """See the module's docstring. J = number of texts.

    Args:
        shares: From `config.sources.shares_of`.
        seed: Seed of the run.
        global_batch_size: B.
    """

    def __init__(self, shares: Sequence[Shares], *, seed: int, global_batch_size: int) -> None:
        self.batch_size, self._seed = global_batch_size, stable_seed("mixing", seed)
        self._firsts = [part.from_step for part in shares]
        self._bounds = [np.array([global_batch_size * bound for bound in part.bounds]) for part in shares]
        self._sums = {0: np.zeros(len(self._bounds[0]) - 1, dtype=np.int64)}
        self._drawn = lru_cache(maxsize=_SUMS_KEPT)(self._draw)

    def texts(self, step: int) -> npt.NDArray[np.intp]:
        """(B,): from which text each sequence of a step's global batch is."""
        return self._drawn(step)

    def before(self, step: int) -> Int64Array:
        """(J,): how many sequences of each text the steps before have."""
        if step not in self._sums:
            known = max(other for other in self._sums if other <= step)
            self._sums[step] = self._sums[known] + sum(self._counted(known, step))
            for old in sorted(self._sums.keys() - {0, step})[: -(_SUMS_KEPT - 1)]:
                del self._sums[old]
        return self._sums[step]

    @property
    def changes(self) -> list[int]:
        """Steps at which shares become others."""
        return self._firsts[1:]

    def weights(self, step: int) -> list[float]:
        """J numbers: the texts' shares at a step."""
        shares: list[float] = (np.diff(self._bounds[self._part(step)]) / self.batch_size).tolist()
        return shares

    def _draw(self, step: int) -> npt.NDArray[np.intp]:
        counts = self._counts(step, step + 1)[0]
        texts = np.empty(self.batch_size, dtype=np.intp)
        texts[epoch_order(self.batch_size, self._seed, step)] = np.repeat(np.arange(len(counts)), counts)
        return texts

    def _part(self, step: int) -> int:
        return int(np.searchsorted(self._firsts, step, side="right")) - 1

    def _counted(self, first: int, stop: int) -> Iterator[Int64Array]:
        """Sums over [first, stop) by parts in which shares are the same."""
        cuts = {first, stop, *(at for at in self._firsts if first < at < stop)}
        cuts |= set(range(first, stop, _STEPS_AT_ONCE))
        for begin, end in zip(sorted(cuts), sorted(cuts)[1:], strict=False):
            yield self._counts(begin, end).sum(axis=0)

    def _counts(self, first: int, stop: int) -> Int64Array:
        """(stop - first, J) sequences of each text in steps of the same shares."""
        steps = np.arange(first, stop, dtype=np.uint64)
        turned = np.uint64(self._seed) + steps * np.uint64(_GOLDEN)  # modulo 2^64
        offsets = (turned >> np.uint64(11)).astype(np.float64) * 2.0**-53  # [0, 1)
        below = np.ceil(self._bounds[self._part(first)] - offsets[:, None])
        return np.diff(below, axis=1).astype(np.int64)


@dataclass(frozen=True)
class MixedPortion:
    """The `Portion` of one text of several."""

    mixing: Mixing
    number: int

    def before(self, step: int) -> int:
        """See `Portion`."""
        return int(self.mixing.before(step)[self.number])

    def within(self, step: int, start: int, stop: int) -> int:
        """See `Portion`."""
        return int(np.count_nonzero(self.mixing.texts(step)[start:stop] == self.number))


class MixedTexts:
    """The `TrainStream` of several texts.

    Args:
        texts: By name, in the order of the mixing's shares; each has its `MixedPortion`.
        mixing: Which of them each sequence comes from.
        seq_len: T.
    """

    def __init__(self, texts: Mapping[str, TrainStream], mixing: Mixing, *, seq_len: int) -> None:
        self._texts, self._mixing, self._seq_len = dict(texts), mixing, seq_len

    def begin(self, step: int, start: int, stop: int) -> None:
        """See `TrainStream`: all texts at the same time."""
        for text in self._texts.values():
            text.begin(step, start, stop)

    def sequences(self, step: int, start: int, stop: int) -> Batch:
        """See `TrainStream`. Of texts that are streamed steps must not decrease."""
        check_range(step, start, stop, self._mixing.batch_size)
        self.begin(step, start, stop)
        chosen = torch.from_numpy(self._mixing.texts(step)[start:stop])
        inputs = torch.empty((stop - start, self._seq_len), dtype=torch.int64)
        labels = torch.empty_like(inputs)
        for number, text in enumerate(self._texts.values()):
            part, places = text.sequences(step, start, stop), chosen == number
            inputs[places], labels[places] = part.input_ids, part.labels
        return Batch(inputs, labels)

    def position(self, step: int | None = None) -> dict[str, Any]:
        """See `TrainStream`: each text's."""
        return {"sources": {name: text.position(step) for name, text in self._texts.items()}}

    def seek(self, step: int, position: dict[str, Any]) -> None:
        """See `TrainStream`. A text that was not there yet begins at its beginning."""
        found = position.get("sources") if isinstance(position, dict) else None
        if not isinstance(found, dict) or not set(found) <= set(self._texts):
            raise UserError(f"{ascii(position)[:60]} is no place in {', '.join(self._texts)}")
        begun = dict(zip(self._texts, self._mixing.before(step), strict=True))
        for name, text in self._texts.items():
            with named_source(name):
                if name in found and found[name] is not None:
                    text.seek(step, found[name])
                elif name not in found and begun[name]:
                    raise UserError("it has been read, but there is no place where it goes on")

    def epochs(self, step: int) -> float:
        """See `TrainStream`: of the text that has been read most often."""
        return max(self.epochs_of_each(step).values())

    def epochs_of_each(self, step: int) -> dict[str, float]:
        """See `epochs`, by text."""
        return {name: text.epochs(step) for name, text in self._texts.items()}

    @property
    def streamed(self) -> list[str]:
        """Names of texts whose length is not known beforehand."""
        return [name for name, text in self._texts.items() if not isinstance(text, StoredSequences)]

    def numbers(self, step: int) -> dict[str, float]:
        """What the steps before one have read of each text, and its share in the last of them; over all ranks."""
        read, weights = self._mixing.before(step), self._mixing.weights(max(0, step - 1))
        found: dict[str, float] = {}
        for number, (name, epochs) in enumerate(self.epochs_of_each(step).items()):
            found[f"data/{name}/tokens"] = int(read[number]) * self._seq_len
            found[f"data/{name}/share"] = int(read[number]) / max(1, step * self._mixing.batch_size)
            found[f"data/{name}/weight"] = round(weights[number], 9)
            found[f"data/{name}/epochs"] = epochs
        return found
