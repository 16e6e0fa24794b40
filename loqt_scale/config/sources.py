"""Several sources of text with weights: what `data.sources` may hold, and the shares that weights mean at a step."""

from __future__ import annotations

import difflib
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from typing import Any

from loqt_scale.config.check import require
from loqt_scale.config.paths import expand_path, same_files
from loqt_scale.errors import shortened

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
ALWAYS = 100_000_000
"""Steps done, of a run that is longer than any."""

_WEIGHTS = 1e-9, 1e9
_EXAMPLE = "{name: web, files: [a.txt], weight: 1}"


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of `data.sources`. What it leaves out is `data`'s own.

    Args:
        name: Names its numbers (`eval/NAME/loss`).
        weight: From step on, weight: (0, w) first, steps in ascending order. Its share of the tokens is its weight
            over the sum of all. 0: it is not read then.
        files: As `data.files`.
        dataset: As `data.dataset`; one of the two.
        dataset_config: As `data.dataset_config`.
        split: As `data.split`.
        eval_split: As `data.eval_split`.
        text_field: As `data.text_field`.
    """

    name: str
    weight: tuple[tuple[int, float], ...] = ((0, 1.0),)
    files: tuple[str, ...] = ()
    dataset: str | None = None
    dataset_config: str | None = None
    split: str | None = None
    eval_split: str | None = None
    text_field: str | None = None

    def weight_at(self, step: int) -> float:
        """Its weight at a step, from 0."""
        return self.weight[bisect_right(self.weight, step, key=lambda part: part[0]) - 1][1]

    def same_text(self, other: SourceConfig) -> bool:
        """Whether another one names the same text under the same name, however paths are spelled."""
        plain = ("name", "dataset_config", "split", "eval_split", "text_field")
        files = self.files == other.files or same_files([*self.files], [*other.files])
        dataset = self.dataset == other.dataset or same_files(self.dataset, other.dataset)
        return files and dataset and all(getattr(self, key) == getattr(other, key) for key in plain)

    def settings(self) -> dict[str, Any]:
        """The mapping that it is read from; paths are expanded, and what was left out stays so."""
        constant = len(self.weight) == 1
        parts = [{"from_step": step, "weight": weight} for step, weight in self.weight]
        known = {key: getattr(self, key) for key in ("dataset", "dataset_config", "split", "eval_split", "text_field")}
        return {
            "name": self.name,
            "weight": self.weight[0][1] if constant else parts,
            **({"files": list(self.files)} if self.files else {}),
            **{key: value for key, value in known.items() if value is not None},
        }


@dataclass(frozen=True)
class Shares:
    """Shares of the sources from a step on.

    Args:
        from_step: The first step, from 0.
        bounds: 0, the first source's share, the sum of the first two, ... 1.
    """

    from_step: int
    bounds: tuple[float, ...]


def read_sources(items: Sequence[Mapping[str, Any]]) -> tuple[SourceConfig, ...]:
    """The sources that `data.sources` holds.

    Raises:
        ConfigError: A key is unknown or missing, a value cannot work, or a name is there twice.
    """
    sources = tuple(_source(item, f"data.sources[{place}]") for place, item in enumerate(items))
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, f"data.sources has two sources called '{twice}'; write another name for one of them")
    for step in _changes(sources):
        require(
            any(source.weight_at(step) for source in sources),
            f"data.sources has no source with a weight from step {step} on; write a positive weight for one of them",
        )
    return sources


def shares_of(sources: Sequence[SourceConfig]) -> tuple[Shares, ...]:
    """The shares from step 0 on, and from each step at which they change."""
    found: list[Shares] = []
    for step in _changes(sources):
        sums = list(accumulate((source.weight_at(step) for source in sources), initial=0.0))
        bounds = tuple(value / sums[-1] for value in sums)
        if not found or bounds != found[-1].bounds:
            found.append(Shares(step, bounds))
    return tuple(found)


def run_shares(sources: Sequence[SourceConfig], steps: int) -> dict[str, float]:
    """Each source's share of the tokens of a run of so many steps."""
    found = [0.0] * len(sources)
    parts = [part for part in shares_of(sources) if part.from_step < steps]
    for part, following in pairwise([*parts, Shares(steps, ())]):
        for number, (low, high) in enumerate(pairwise(part.bounds)):
            found[number] += (high - low) * (following.from_step - part.from_step) / steps
    return {source.name: share for source, share in zip(sources, found, strict=True)}


def goes_on(before: Sequence[SourceConfig], after: Sequence[SourceConfig], done: int) -> bool:
    """Whether a run of `before` can go on with `after` when `done` steps are done.

    The text of those steps must be what it was: the same sources in their order (others may have come, which were not
    read yet), with the same shares.
    """
    known = [source for source in after if any(source.name == old.name for old in before)]
    new = [source for source in after if source not in known]
    return (
        len(known) == len(before)
        and all(one.same_text(other) for one, other in zip(before, known, strict=True))
        and not any(weight for source in new for step, weight in source.weight if step < done)
        and _until(shares_of(before), done) == _until(shares_of(known), done)
    )


def why_not(before: Sequence[SourceConfig], after: Sequence[SourceConfig], done: int) -> str:
    """What to write instead, where a run of `before` cannot go on with `after` when `done` steps are done."""
    old, new = {source.name: source for source in before}, {source.name: source for source in after}
    gone = next((name for name in old if name not in new), None)
    if gone is not None:
        return f"'{gone}' is not there; put it back, with {_then(old[gone].weight, done, 0)} to read it no more"
    if [name for name in new if name in old] != [*old]:
        return f"write {', '.join(old)} in this order"
    other = next((name for name in old if not old[name].same_text(new[name])), None)
    if other is not None:
        return f"'{other}' names another text; write its files or dataset as they were, other text as a new source"
    early = next((source for source in after if source.name not in old and source.weight_at(done - 1)), None)
    if early is not None:
        return f"'{early.name}' is new; write {_then([(0, 0)], done, early.weight_at(done))}"
    changed = next((name for name in old if old[name].weight_at(done - 1) != new[name].weight_at(done - 1)), None)
    if changed is None:
        return f"weights of the first {done} steps have changed; write them as they were"
    wanted = _then(old[changed].weight, done, new[changed].weight_at(done))
    return f"the weight of '{changed}' has changed for steps that are done; write {wanted}"


def _then(weight: Sequence[tuple[int, float]], done: int, later: float) -> str:
    parts = [*(part for part in weight if part[0] < done), (done, later)]
    return f"weight: [{', '.join(f'{{from_step: {step}, weight: {value:g}}}' for step, value in parts)}]"


def _until(shares: Sequence[Shares], done: int) -> list[Shares]:
    return [part for part in shares if part.from_step < done]


def _changes(sources: Sequence[SourceConfig]) -> list[int]:
    return sorted({step for source in sources for step, _ in source.weight})


def _source(item: Any, key: str) -> SourceConfig:
    require(isinstance(item, Mapping), f"{key} is {shortened(repr(item))}; write a mapping such as {_EXAMPLE}")
    known = [field.name for field in fields(SourceConfig)]
    for name in item:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"write one of {', '.join(known)}"
        require(name in known, f"unknown key '{shortened(str(name))}' in {key}; {hint}")
    name = item.get("name")
    require(name is not None, f"{key} has no name; write one, as in {_EXAMPLE}")
    require(
        isinstance(name, str) and _NAME.fullmatch(name) is not None,
        f"{key}.name is {shortened(repr(name))}; write a letter and up to 63 letters, digits, '_', '-' and '.'",
    )
    key = f"data.sources, '{name}'"
    texts = {part: _text(item.get(part), f"{key}: {part}") for part in known[3:]}
    files = _files(item.get("files"), f"{key}: files")
    dataset = None if texts["dataset"] is None else expand_path(texts["dataset"], f"{key}: dataset")
    require(bool(files) != bool(dataset), f"{key}: {'both' if files else 'neither'} files and dataset; write one")
    for part in ("dataset_config", "split", "eval_split"):
        require(dataset is not None or texts[part] is None, f"{key}: {part} is of a dataset, and it has files")
    weight = _weight(item.get("weight", 1.0), f"{key}: weight")
    return SourceConfig(name=str(name), weight=weight, files=files, **(texts | {"dataset": dataset}))


def _text(value: Any, key: str) -> str | None:
    require(value is None or isinstance(value, str), f"{key} is {value!r}; write text (quote it if it is a number)")
    require(value != "", f"{key} is empty; write it, or leave it out")
    return None if value is None else str(value)


def _files(value: Any, key: str) -> tuple[str, ...]:
    value = [] if value is None else value
    good = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    require(good, f"{key} is {shortened(repr(value))}; write a list such as [a.txt, 'b/*.jsonl']")
    return tuple(expand_path(item, key) for item in value)


def _weight(value: Any, key: str) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, list | tuple):
        return ((0, _number(value, key, least=_WEIGHTS[0])),)
    parts = tuple(_part(part, key) for part in value)
    steps = [step for step, _ in parts]
    require(
        bool(steps) and steps[0] == 0 and all(one < other for one, other in pairwise(steps)),
        f"{key} has the steps {steps}; write them in ascending order, from_step: 0 first",
    )
    require(any(weight for _, weight in parts), f"{key} is 0 at every step; write a positive weight, or no such source")
    return parts


def _part(part: Any, key: str) -> tuple[int, float]:
    good = isinstance(part, Mapping) and set(part) == {"from_step", "weight"}
    require(good, f"{key} holds {shortened(repr(part))}; write a number, or [{{from_step: 0, weight: 1}}, ...]")
    step = part["from_step"]
    require(
        isinstance(step, int) and not isinstance(step, bool) and 0 <= step < ALWAYS,
        f"{key}: from_step is {step!r}; write 0 to {ALWAYS - 1} (steps that are done by then)",
    )
    return step, _number(part["weight"], key, least=0.0)


def _number(value: Any, key: str, *, least: float) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    low, high = _WEIGHTS
    fits = good and least <= value <= high and (value == 0 or value >= low)
    hint = " (0: not read then)" if least == 0 else ""
    require(fits, f"{key} is {shortened(repr(value))}; write a positive number, {low} to {high}{hint}")
    return float(value)
