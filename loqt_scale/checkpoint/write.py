"""A run's shares to a folder of safetensors files: torch.distributed.checkpoint does the work.

Its safetensors storage is used rather than the default one, whose metadata is a pickle: nothing in a checkpoint can run
code. Every rank writes one file of its own. How they are read again: `load.py`.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save

from loqt_scale.checkpoint.files import CheckpointError, file_digest
from loqt_scale.checkpoint.folder import CheckpointFolder
from loqt_scale.checkpoint.manifest import Manifest
from loqt_scale.checkpoint.state import Shares, describe
from loqt_scale.errors import one_line
from loqt_scale.strategies import Channel


def save_checkpoint(
    folder: CheckpointFolder,
    manifest: Manifest,
    write_side_files: Callable[[Path], None],
    shares: Shares,
    channel: Channel,
) -> None:
    """Writes a checkpoint and makes it the latest. Every rank; when it returns on any, it counts.

    It touches neither model nor optimizer and talks through the channel only, so a background thread may call it.

    Args:
        folder: Where the run's checkpoints lie.
        manifest: What it says about itself; tensors and files are filled in here.
        write_side_files: Writes what is not tensors (settings, tokenizer, ...) into the folder it gets; one rank.
        shares: What `read_state` returned.
        channel: To the other ranks.

    Raises:
        CheckpointError: A rank could not write: on all ranks; nothing was published, and nothing keeps the disk full.
    """
    partial = folder.partial(manifest.step)
    with _nothing_left(partial, channel):
        digests: dict[str, str] = {}
        with _all_or_none(channel, f"checkpoint of step {manifest.step} not saved"):
            if channel.rank == 0:
                write_side_files(folder.begin(manifest.step))
                side_files = (path for path in partial.rglob("*") if path.is_file())
                digests |= {path.relative_to(partial).as_posix(): file_digest(path) for path in side_files}
        with _all_or_none(channel, f"checkpoint of step {manifest.step} not saved"), _quiet():
            writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
            save(shares, storage_writer=writer, process_group=channel.group, no_dist=channel.group is None)
            mine = partial.glob(f"shard-{channel.rank + 1:05d}-*")
            digests |= {path.name: file_digest(path) for path in mine}
        files = {name: digest for part in channel.gather_objects(digests) for name, digest in part.items()}
        with _all_or_none(channel, f"checkpoint of step {manifest.step} not published"):
            if channel.rank == 0:
                sizes = {name: (partial / name).stat().st_size for name in files}
                folder.publish(manifest.step, manifest.completed(describe(shares), files, sizes))


@contextmanager
def _nothing_left(partial: Path, channel: Channel) -> Iterator[None]:
    """Removes what a failed save has written. Every rank."""
    try:
        yield
    except CheckpointError:
        if channel.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def _all_or_none(channel: Channel, what: str) -> Iterator[None]:
    """Raises CheckpointError on every rank if one of them raised inside. Every rank."""
    mine = ""
    try:
        yield
    except CheckpointException as error:  # no Exception: torch's sum of what went wrong on the ranks
        mine = "; ".join(f"rank {rank}: {one_line(reason)}" for rank, (reason, _) in error.failures.items())
    except Exception as error:  # a full disk speaks through several libraries, each with errors of its own
        mine = f"rank {channel.rank}: {one_line(error)}"
    failed = dict.fromkeys(text for text in channel.gather_objects(mine) if text)
    if failed:
        raise CheckpointError(f"{what}: {'; '.join(failed)}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch.distributed.checkpoint's notes for its own developers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed")
        yield
