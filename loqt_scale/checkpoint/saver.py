"""Saving a run now and then without holding it up.

    save     the ranks' shares are copied to the host: training waits for this
    write    files, checksums, publication, old checkpoints removed: in a background thread, through a process group of
             its own, so that its talk cannot get between the training's collectives

One checkpoint is written at a time; the next one waits for it. A copy that is being written is apart from the model's
memory, so what is saved is the step that it was asked for. What fails is told, and training goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from torch import nn
from torch.optim import Optimizer

from loqt_scale.checkpoint.files import CheckpointError
from loqt_scale.checkpoint.folder import CheckpointFolder
from loqt_scale.checkpoint.manifest import Manifest
from loqt_scale.checkpoint.state import Shares, read_state
from loqt_scale.checkpoint.store import save_checkpoint
from loqt_scale.config import CheckpointConfig
from loqt_scale.strategies import Channel, Strategy


class CheckpointSaver:
    """Saves the checkpoints of one run; as a context it waits at its end for the one that is being written.

    Args:
        root: Folder of the run's checkpoints; need not exist.
        config: What is kept, and whether files are written in the background.
        strategy: How the model is spread.
        warn: Takes a line for people.
    """

    def __init__(
        self, root: Path, config: CheckpointConfig, strategy: Strategy, *, warn: Callable[[str], None]
    ) -> None:
        self._folder, self._config, self._strategy, self._warn = CheckpointFolder(root), config, strategy, warn
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        manifest: Manifest,
        write_documents: Callable[[Path], None],
        model: nn.Module,
        optimizer: Optimizer,
    ) -> None:
        """Saves a checkpoint, or begins to. Every rank.

        Args:
            manifest: What it says about itself; tensors and files are filled in later.
            write_documents: Writes what is not tensors into the folder it gets; one rank, perhaps in the background.
            model: The model, without its strategy's wrapper.
            optimizer: Its optimizer.
        """
        self.wait()
        shares = read_state(model, optimizer, self._strategy)
        arguments = (manifest, write_documents, shares, self._strategy.side_channel())
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()
        if not self._config.background:
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written any more. Local, though the writing may wait for other ranks."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if isinstance(error, CheckpointError):
            self._warn(f"WARNING: {error}; training goes on")
        elif error is not None:
            raise error

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait()

    def _write(
        self, manifest: Manifest, write_documents: Callable[[Path], None], shares: Shares, channel: Channel
    ) -> None:
        try:
            save_checkpoint(self._folder, manifest, write_documents, shares, channel)
            if self._strategy.is_main:
                self._prune()
        except BaseException as error:  # told, or raised, where it is waited for
            self._error = error

    def _prune(self) -> None:
        try:
            self._folder.prune(keep_last=self._config.keep_last, keep_every=self._config.keep_every)
        except OSError as error:
            self._warn(f"WARNING: an old checkpoint cannot be removed: {error}")
