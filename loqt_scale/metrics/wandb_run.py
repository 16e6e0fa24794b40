"""A run's numbers in Weights & Biases, beside metrics.jsonl. Nothing that goes wrong there ends a run."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loqt_scale.config import MetricsConfig
from loqt_scale.errors import ConfigError, one_line
from loqt_scale.metrics.reminder import Tell

ID_FILE = "wandb-id.txt"


def check_wandb(settings: MetricsConfig) -> None:
    """Raises ConfigError if wandb is asked for and not installed. (Its own folder `wandb` here is no package.)"""
    spec = find_spec("wandb") if settings.wandb else None
    if settings.wandb and (spec is None or spec.origin is None):
        raise ConfigError(
            "metrics.wandb is true, but wandb is not installed; run: pip install 'loqt-scale[wandb]', or write "
            "metrics.wandb: false"
        )


class WandbRun:
    """One run there. Its id is kept in the run's folder, so that a run that goes on is the same one there.

    Args:
        settings: Project and name.
        run_dir: Existing folder of the run; wandb's own files go there, too.
        hyperparameters: Every setting by its dotted key.
        resumes: Whether the run goes on, with the id that it had.
        tell: Takes a line for people.
    """

    def __init__(
        self, settings: MetricsConfig, run_dir: Path, hyperparameters: Mapping[str, Any], *, resumes: bool, tell: Tell
    ) -> None:
        self._tell, self._run = tell, None
        self._run = self._trying(lambda: _begin(settings, run_dir, hyperparameters, resumes))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends scalars of one step. A step that was done again after a resume is drawn twice, at the same place."""
        run: Any = self._run
        if run is not None:
            self._trying(lambda: run.log({"step": step, **values}))

    def close(self, *, succeeded: bool) -> None:
        """Ends it; a second call does nothing."""
        run: Any = self._run
        if run is not None:
            self._trying(lambda: run.finish(exit_code=0 if succeeded else 1))
        self._run = None

    def _trying(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # whatever a service, a network, a library raises
            self._run = None
            self._tell(f"WARNING: wandb gets no more numbers of this run, which goes on ({one_line(error)})")
            return None


def _begin(settings: MetricsConfig, run_dir: Path, hyperparameters: Mapping[str, Any], resumes: bool) -> Any:
    import wandb

    run = wandb.init(
        project=settings.wandb_project,
        name=settings.wandb_name or run_dir.resolve().name,
        id=_run_id(run_dir / ID_FILE, resumes),
        resume="allow",
        dir=str(run_dir),
        config=dict(hyperparameters),
        settings=wandb.Settings(console="off"),  # standard output is ours, and outlasts a reader that has gone
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")  # wandb's own count of steps could not go back to a checkpoint
    return run


def _run_id(path: Path, resumes: bool) -> str:
    if not (resumes and path.exists()):
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
