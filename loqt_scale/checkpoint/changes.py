"""Which settings may change between a checkpoint and the run that goes on from it, and what works for the others.

Free are those that do not change the numbers (a warm-up in steps that is as long as one in a fraction, say; `loqt.*` of
full-rank runs). Four that do may change as well, and it is said: `train.steps` may grow, `optim.states` may be another,
sketches of later merges may be wider or narrower, and `data.sources` may be others from the checkpoint's step on
(`config.sources.goes_on`). Every other change is refused, with the ways that lead on.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from loqt_scale.checkpoint.files import CheckpointError
from loqt_scale.checkpoint.growth import describe_growth
from loqt_scale.checkpoint.manifest import Manifest
from loqt_scale.checkpoint.opened import Checkpoint
from loqt_scale.config import RunConfig
from loqt_scale.config.keys import flat_settings, path_settings
from loqt_scale.config.paths import same_files
from loqt_scale.config.sources import ALWAYS, goes_on, read_sources, why_not

FREE = (
    "checkpoint.",
    "parallel.",
    "metrics.",
    "model.compile",
    "model.activation_checkpointing",
    "model.loss_chunk_tokens",
    "optim.compile",
    "data.cache_dir",
    "train.run_dir",
    "train.on_existing_run",
    "train.device",
    "train.micro_batch_size",
    "train.eval_every",
    "train.log_every",
    "train.progress",
    "train.wire_counter",
    "train.peak_tflops",
    "train.profile",
)
_WARMUP = ("optim.warmup_steps", "optim.warmup_fraction")
_SOURCES, _LATER_SOURCES = "data.sources", "data.sources of later steps"
_SKETCHES = "loqt.subspace.oversampling"
_MAY_CHANGE = ("train.steps", "optim.states", _SKETCHES, _LATER_SOURCES)
_OF_THE_MODEL = ("model.preset", "model.path", "model.weights", "model.overrides", "data.tokenizer", "data.bpe_vocab")
Changes = dict[str, tuple[Any, Any]]


def changed_settings(checkpoint: Path, config: RunConfig) -> Changes:
    """Settings that are not free and have changed since a checkpoint: its value and the run's, by dotted key.

    Raises:
        CheckpointError: Its manifest or its settings cannot be read.
    """
    opened = Checkpoint(checkpoint)
    return changes_between(opened.settings(), config, done=opened.manifest.step)


def changes_between(before: RunConfig, after: RunConfig, *, done: int | None = None) -> Changes:
    """Settings that are not free and mean something else in another run: both values by dotted key.

    Args:
        before: A run.
        after: Another one.
        done: Steps that have been taken of the first; None: all.
    """
    steps = before.train.steps
    same_warmup = before.optim.warmup_of(steps) == after.optim.warmup_of(steps)
    full_rank = before.method == after.method == "full"
    free = FREE + (_WARMUP if same_warmup else ()) + (("loqt.",) if full_rank else ())
    old, new = flat_settings(before), flat_settings(after)
    changed = (key for key in new if not _same(old[key], new[key]) and not key.startswith(free))
    paths = path_settings()
    changes = {key: (old[key], new[key]) for key in changed if key not in paths or not same_files(old[key], new[key])}
    return _with_sources(changes, before, after, done)


def _with_sources(changes: Changes, before: RunConfig, after: RunConfig, done: int | None) -> Changes:
    """Changes without those of sources that mean the same; one that is of later steps only is called so."""
    sources, others = before.data.mixture, after.data.mixture
    if _SOURCES not in changes or not sources or not others:
        return changes
    rest = {key: pair for key, pair in changes.items() if key != _SOURCES}
    if len(sources) == len(others) and goes_on(sources, others, ALWAYS):
        return rest
    if done is not None and goes_on(sources, others, done):
        return rest | {_LATER_SOURCES: changes[_SOURCES]}
    return changes


def of_another_run(changes: Changes) -> Changes:
    """Those that a run cannot go on with."""
    return {key: pair for key, pair in changes.items() if key not in _MAY_CHANGE}


def describe(changes: Changes) -> str:
    """For people: `optim.lr was 0.1, is 0.2; ...`."""
    return "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changes.items())


def check_changes(checkpoint: Path, manifest: Manifest, changes: Changes, config: RunConfig) -> list[str]:
    """Refuses changes that a run cannot go on with.

    Args:
        checkpoint: What it would go on from.
        manifest: What that says about itself.
        changes: See `changed_settings`.
        config: The run that would go on.

    Returns:
        Lines for people on those that it can go on with.

    Raises:
        CheckpointError: Others; each is named, and so are the ways that do work. Or the learning rates were not ours.
    """
    _check_rates(checkpoint, manifest)
    wrong = of_another_run(changes)
    if wrong:
        hint = _of_sources(wrong, manifest.step)
        raise CheckpointError(
            f"settings have changed since {checkpoint}: {describe(wrong)}. {hint}{_ways(checkpoint, wrong)}"
        )
    before, steps = changes.get("train.steps", (0, 0))
    if steps < before:
        raise CheckpointError(
            f"train.steps was {before} in {checkpoint} (after step {manifest.step}), is {steps}: it may grow but not "
            f"shrink, since learning rates have followed it. Write {before} or more to go on, or checkpoint.resume: "
            "never to start anew"
        )
    return _notes(manifest, changes, config)


def _check_rates(checkpoint: Path, manifest: Manifest) -> None:
    """Refuses a run whose rates DeepSpeed's scheduler has moved: with `optim.schedule` they would jump unnoticed."""
    name = _deepspeeds_scheduler(checkpoint) if manifest.strategy.startswith("zero") else None
    if name is not None:
        raise CheckpointError(
            f"the learning rates of {checkpoint} were those of DeepSpeed's scheduler {name}, which is no longer "
            "supported (optim.schedule: linear takes the place of WarmupDecayLR, cosine of WarmupCosineLR, constant of "
            f"WarmupLR). Go on with the version of loqt_scale that saved it; or {_as_a_new_run(checkpoint)}"
        )


def _deepspeeds_scheduler(checkpoint: Path) -> str | None:
    """The scheduler in the DeepSpeed JSON of a checkpoint's run, as earlier versions took it; None: there is none."""
    for folder in checkpoint.parents[:3]:  # a line that was set aside is a folder deeper
        with suppress(OSError, ValueError, LookupError, TypeError):
            settings = json.loads((folder / "deepspeed.json").read_text(encoding="utf-8"))
            return str(settings["scheduler"]["type"])
    return None


def _notes(manifest: Manifest, changes: Changes, config: RunConfig) -> list[str]:
    what = {
        "train.steps": "learning rates and merges",
        "optim.states": "the optimizer's moments",
        _SKETCHES: "merges' sketches",
        _LATER_SOURCES: "text and weights",
    }
    notes = {
        key: f"{key} was {changes[key][0]}, is {changes[key][1]}: from step {manifest.step + 1} on, {whose} are those "
        "of such a run"
        for key, whose in what.items()
        if key in changes
    }
    if "train.steps" in notes:
        notes["train.steps"] += f", {describe_growth(manifest, config, changes['train.steps'][0])}"
    return list(notes.values())


def _of_sources(wrong: Changes, done: int) -> str:
    """How other sources and weights can be had from the next step on."""
    old, new = wrong.get(_SOURCES, ([], []))
    if not old or not new:
        return ""
    why = why_not(read_sources(old), read_sources(new), done)
    return f"Of data.sources those of steps after {done} may change: {why}. "


def _ways(checkpoint: Path, wrong: Changes) -> str:
    anew = "checkpoint.resume: never to start anew"
    if any(key.startswith(_OF_THE_MODEL) for key in wrong):
        return f"Write the old values to go on, or {anew}"
    return f"Write the old values to go on; or {_as_a_new_run(checkpoint)}; or {anew}"


def _as_a_new_run(checkpoint: Path) -> str:
    return (
        f"train its weights as a new run: loqt-scale export --checkpoint {checkpoint} --out DIR --dtype float32, then "
        "model.path: DIR, model.weights: pretrained, model.overrides: {} with another train.run_dir"
    )


def _same(old: Any, new: Any) -> bool:
    """Equal values; of mappings, whose first pattern that matches counts, in the same order."""
    return old == new and (not isinstance(old, dict) or list(old) == list(new))
