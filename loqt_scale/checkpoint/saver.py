"""Saving a run now and then without holding it up.

    save     the ranks' shares are copied to the host: training waits for this
    write    files, checksums, publication, old checkpoints removed: in a background thread, through a process group of
             its own, so that its talk cannot get between the training's collectives

One checkpoint is written at a time; the next one waits for it. A copy that is being written is apart from the model's
memory, so what is saved is the step that it was asked for. What fails is told, and training goes on; it is due again
some seconds later, then twice as many, and so on (`overdue`), so that a disk which has room again gets a checkpoint.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from torch import nn
from torch.optim import Optimizer

from loqt_scale.checkpoint.files import CheckpointError
from loqt_scale.checkpoint.folder import CheckpointFolder
from loqt_scale.checkpoint.growth import begins_decay
from loqt_scale.checkpoint.manifest import Manifest, read_manifest
from loqt_scale.checkpoint.state import Shares, read_state
from loqt_scale.checkpoint.write import save_checkpoint
from loqt_scale.config import CheckpointConfig
from loqt_scale.metrics import Reminder
from loqt_scale.strategies import Channel, Editing

FIRST_PAUSE, LONGEST_PAUSE = 10.0, 600.0  # seconds from a save that failed until it is tried again


class CheckpointSaver:
    """Saves the checkpoints of one run; as a context it waits at its end for the one that is being written.

    Args:
        root: Folder of the run's checkpoints; need not exist.
        config: What is kept, and whether files are written in the background.
        editing: How the model is spread.
        tell: Takes a line for people.
    """

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        editing: Editing,
        *,
        tell: Callable[[str], None],
    ) -> None:
        self._folder, self._config, self._editing, self._tell = CheckpointFolder(root), config, editing, tell
        self.saved: int | None = None  # steps done in the newest checkpoint that the run can go on from
        self.failure: CheckpointError | None = None  # of the last save
        self.seconds = 0.0  # that the last save which succeeded took, of this process; 0 = there was none
        self._reminder = Reminder(tell)
        self._pause, self._retry_at = FIRST_PAUSE, 0.0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        manifest: Manifest,
        write_side_files: Callable[[Path], None],
        model: nn.Module,
        optimizer: Optimizer,
        *,
        keep_all: bool = False,
    ) -> None:
        """Saves a checkpoint, or begins to. Every rank.

        Args:
            manifest: What it says about itself; tensors and files are filled in later.
            write_side_files: Writes what is not tensors into the folder it gets; one rank, perhaps in the background.
            model: The model, without its strategy's wrapper.
            optimizer: Its optimizer.
            keep_all: Remove no older checkpoint for it.
        """
        self.wait()
        began = time.monotonic()
        shares = read_state(model, optimizer, self._editing)
        arguments = (manifest, write_side_files, shares, self._editing.comm.side_channel(), keep_all, began)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()
        if not self._config.background:
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written any more. Local, though the writing may wait for other ranks."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.join()
        error, self._error = self._error, None
        if error is None:
            self._succeeded()
        elif isinstance(error, CheckpointError):
            self._failed(error)
        else:
            raise error

    def overdue(self) -> bool:
        """Whether the last save has failed some time ago: it is time that all ranks save again. Local, waits never."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()
        return self._thread is None and self.failure is not None and time.monotonic() > self._retry_at

    def way_on(self, done: int, hindrance: str | None = None) -> str:
        """Where the run goes on after `done` steps, for people; nothing is being written. Local.

        Args:
            done: Steps.
            hindrance: Why they are not saved, if it is known and they are not.
        """
        newest, why = self._newest(), "" if hindrance is None else f" ({hindrance})"
        if newest == done:
            return "it is saved, and the same command goes on from there"
        if newest is None:
            return f"nothing has been saved, the same command starts anew{why}"
        return f"it is not saved, the same command goes on from step {newest}{why}"

    def _newest(self) -> int | None:
        """The step that the same command goes on from: a save may fail after its publication, by a rank's death."""
        with suppress(CheckpointError, OSError):
            latest = self._folder.latest()
            return self.saved if latest is None else read_manifest(latest).step
        return self.saved

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception:
            if error is None:  # else: what ends the run ends the writing too, and is what people should hear of
                raise

    def _succeeded(self) -> None:
        self.failure, self._pause = None, FIRST_PAUSE
        self._reminder.over(f"checkpoint of step {self.saved} saved: checkpoints can be written again")

    def _failed(self, error: CheckpointError) -> None:
        self._reminder.trouble(f"{error}; training goes on, and will try again")
        self.failure = error
        self._retry_at = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _write(
        self,
        manifest: Manifest,
        write_side_files: Callable[[Path], None],
        shares: Shares,
        channel: Channel,
        keep_all: bool,
        began: float,
    ) -> None:
        try:
            save_checkpoint(self._folder, manifest, write_side_files, shares, channel)
            self.saved, self.seconds = manifest.step, time.monotonic() - began
            if self._editing.comm.is_main and not keep_all:
                self._prune()
        except BaseException as error:  # told, or raised, where it is waited for
            self._error = error

    def _prune(self) -> None:
        try:
            keep_last, keep_every = self._config.keep_last, self._config.keep_every
            self._folder.prune(keep_last=keep_last, keep_every=keep_every, kept=begins_decay)
        except OSError as error:
            self._tell(f"WARNING: an old checkpoint cannot be removed: {error}")
