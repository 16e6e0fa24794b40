"""`train.profile`: torch.profiler's record of some steps, one file a rank, and on CUDA a history of memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from loqt_scale.config import ProfileConfig
from loqt_scale.errors import one_line
from loqt_scale.metrics import Tell
from loqt_scale.process.streams import warn

FOLDER = "profile"
_EVENTS = 1_000_000  # allocations that a history holds


class StepProfile:
    """Records steps [start, start + steps) of a run into `<run_dir>/profile`.

    `steps-A-B.rank-N.json.gz`, named by the steps that it holds, is a trace for Perfetto (ui.perfetto.dev) or
    chrome://tracing, with the regions data, forward, backward, optimizer and merge; on CUDA,
    `steps-A-B.rank-N.memory.pickle` is for pytorch.org/memory_viz. A file that cannot be written is told,
    and ends nothing.

    Args:
        settings: Which steps.
        run_dir: Folder of the run.
        rank: This rank.
        device: Where it computes.
        tell: Takes a line for people.
    """

    def __init__(self, settings: ProfileConfig, run_dir: str, *, rank: int, device: torch.device, tell: Tell) -> None:
        self._steps = range(settings.start - 1, settings.start - 1 + settings.steps)
        self._cuda, self._tell = device.type == "cuda", tell
        self._folder, self._rank = Path(run_dir) / FOLDER, rank
        self._profiler: profile | None = None
        self._first = self._last = 0  # steps that are recorded, counted from 1

    def begin(self, step: int) -> None:
        """Begins to record, if this step (from 0) is the first of the window that this process takes; notes it."""
        if step not in self._steps:
            return
        self._last = step + 1
        if self._profiler is not None:
            return
        self._first = self._last
        if self._cuda:
            torch.cuda.memory._record_memory_history(max_entries=_EVENTS)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profiler.start()

    def ends_with(self, step: int) -> bool:
        """Whether the window's last step is this one (from 0)."""
        return self._profiler is not None and step == self._steps[-1]

    def close(self) -> None:
        """Stops and writes what there is; nothing if nothing is being recorded."""
        recorded, self._profiler = self._profiler, None
        if recorded is None:
            return
        recorded.stop()
        name = f"steps-{self._first}-{self._last}.rank-{self._rank}"
        path = self._folder / f"{name}.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            recorded.export_chrome_trace(str(path))
            if self._cuda:
                torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.memory.pickle"))
            self._tell(f"profile: {path}")
        except (OSError, RuntimeError) as error:
            warn(f"WARNING: the profile {path} cannot be written ({one_line(error)}); training goes on")
        finally:
            if self._cuda:
                torch.cuda.memory._record_memory_history(enabled=None)

    def region(self, name: str) -> AbstractContextManager[object]:
        """A named region of the trace; nothing at all while nothing is being recorded."""
        return nullcontext() if self._profiler is None else record_function(name)
