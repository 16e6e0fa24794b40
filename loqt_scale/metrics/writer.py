"""The same scalars twice: one JSON object a line for scripts, TensorBoard for eyes.

    {"step": 3, "train/loss": 5.25, "train/tokens_per_second": 12034.5}

Each line is written at once, so a run that is killed keeps all but its last line, and `tail -f` follows it. What a full
disk does not take waits in memory (see `lasting`).
JSON has no NaN or infinity; such values are written as the strings "nan", "inf" and "-inf", which every strict parser
accepts and `float()` reads back (null would not say which of them a diverged run reached).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loqt_scale.config import RunConfig
from loqt_scale.config.keys import flat_settings
from loqt_scale.errors import named
from loqt_scale.metrics.events import EventFile
from loqt_scale.metrics.lasting import LastingFile
from loqt_scale.metrics.reminder import Tell
from loqt_scale.metrics.wandb_run import WandbRun
from loqt_scale.process.streams import warn

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
COMPARED = ("eval/loss", "train/loss", "perf/tokens_per_second", "perf/tflops_per_rank", "perf/mfu")
"""Whose last values TensorBoard's HParams shows of each run."""


class MetricsWriter:
    """Appends scalars to `<run_dir>/metrics.jsonl` and `<run_dir>/tensorboard`.

    Args:
        run_dir: Existing folder of the run.
        enabled: False on all ranks but one: every call then does nothing, so that the caller needs no `if`.
        resume_step: Step after which a run goes on: what the files say of later steps is removed. None: a new run.
        evaluates_again: Whether the run begins with an evaluation after that step: one that is there is removed too.
        settings: The run, for TensorBoard's table of runs (HParams) and wandb; None: neither.
        tell: Takes a line for people, when the files cannot be written; default: stderr.

    Raises:
        ImportError: tensorboard is not installed.
        OSError: The files cannot be opened. (What cannot be written later is not raised.)
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        enabled: bool = True,
        *,
        resume_step: int | None = None,
        evaluates_again: bool = False,
        settings: RunConfig | None = None,
        tell: Tell = warn,
    ) -> None:
        self._file: LastingFile | None = None
        self._board: EventFile | None = None
        self._wandb: WandbRun | None = None
        self._described, self._succeeded = settings is not None, False
        if enabled:
            path = Path(run_dir) / METRICS_FILE
            if resume_step is not None:
                _forget_after(path, resume_step, evaluation=evaluates_again)
            purge_step = None if resume_step is None else resume_step + (not evaluates_again)
            self._board = EventFile(Path(run_dir) / TENSORBOARD_FOLDER, purge_step, tell)
            if evaluates_again:
                _copy(path, self._board, purge_step or 0)
            self._file = LastingFile(path, tell)
            if settings is not None:
                known = {name: value for name, value in flat_settings(settings).items() if value is not None}
                self._board.describe(known, COMPARED, purge_step or 0)
                if settings.metrics.wandb:
                    resumes = resume_step is not None
                    self._wandb = WandbRun(settings.metrics, Path(run_dir), known, resumes=resumes, tell=tell)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line of scalars.

        Args:
            step: Optimizer steps done; TensorBoard's horizontal axis.
            values: Plain numbers by name (`group/name`). A tensor is read with `float()`, which waits for its device.

        Raises:
            ValueError: A metric is called `step`.
        """
        if self._file is None or self._board is None:
            return
        if "step" in values:
            raise ValueError("a metric is called 'step', which names the step itself; write another name")
        scalars = {name: _scalar(value) for name, value in values.items()}
        line = {"step": int(step), **{name: _json_value(value) for name, value in scalars.items()}}
        self._file.write((json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n").encode())
        self._board.log(int(step), scalars)
        if self._wandb is not None:
            self._wandb.log(int(step), scalars)

    def succeed(self, step: int) -> None:
        """The run is over, after so many steps, and has gone well: other tools are told so."""
        self._succeeded = True
        if self._board is not None and self._described:
            self._board.succeeded(step)

    def close(self) -> None:
        """Close both files; a second call does nothing."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.close(succeeded=self._succeeded)
        self._file = self._board = self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def replay(run_dir: str | os.PathLike[str], tell: Tell = warn) -> None:
    """Makes TensorBoard's curves those of `metrics.jsonl`, which has become that of another line of checkpoints.

    Args:
        run_dir: Folder of the run.
        tell: As for `MetricsWriter`.

    Raises:
        ImportError: tensorboard is not installed.
        OSError: The event file cannot be opened.
    """
    board = EventFile(Path(run_dir) / TENSORBOARD_FOLDER, 0, tell)
    _copy(Path(run_dir) / METRICS_FILE, board, 0)
    board.close()


def _copy(path: Path, board: EventFile, first: int) -> None:
    """Whole lines from a step on."""
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            step, values = int(row.pop("step")), {name: float(value) for name, value in row.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if step >= first:
            board.log(step, values)


def _forget_after(path: Path, step: int, *, evaluation: bool) -> None:
    """Removes lines of later steps (of this step too, if of an evaluation), and a last one that was not finished.

    Needs no room on the disk.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _is_until(line, step, evaluation)]
    if kept == lines[: len(kept)]:
        os.truncate(path, sum(map(len, kept)))
        return
    replacement = path.with_suffix(".new")
    with named(replacement):
        replacement.write_bytes(b"".join(kept))
    replacement.replace(path)


def _is_until(line: bytes, step: int, evaluation: bool) -> bool:
    """Whether this is a whole line, of a step up to that one, and no evaluation of that one if those are left out."""
    try:
        row = json.loads(line)
        last = row["step"] == step and not (evaluation and "eval/loss" in row)
        return line.endswith(b"\n") and (row["step"] < step or last)
    except (ValueError, KeyError, TypeError):
        return False


def _scalar(value: Any) -> float:
    return value if type(value) is int else float(value)


def _json_value(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
