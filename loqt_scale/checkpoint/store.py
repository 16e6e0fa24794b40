"""A run's shares to and from a folder of safetensors files: torch.distributed.checkpoint does the work.

Its safetensors storage is used rather than the default one, whose metadata is a pickle: nothing in a checkpoint can run
code. Every rank writes one file of its own and reads what it needs of all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from loqt_scale.checkpoint.files import CheckpointError, damaged_files, file_digest, refuse_damaged
from loqt_scale.checkpoint.folder import CONFIG, CheckpointFolder
from loqt_scale.checkpoint.manifest import Manifest, read_manifest
from loqt_scale.checkpoint.state import Outlines, Shares, describe, empty_state, write_state
from loqt_scale.strategies import Channel, Strategy


def save_checkpoint(
    folder: CheckpointFolder,
    manifest: Manifest,
    write_documents: Callable[[Path], None],
    shares: Shares,
    channel: Channel,
) -> None:
    """Writes a checkpoint and makes it the latest. Every rank; when it returns on any, it counts.

    It touches neither model nor optimizer and talks through the channel only, so a background thread may call it.

    Args:
        folder: Where the run's checkpoints lie.
        manifest: What it says about itself; tensors and files are filled in here.
        write_documents: Writes what is not tensors (settings, tokenizer, ...) into the folder it gets; one rank.
        shares: What `read_state` returned.
        channel: To the other ranks.

    Raises:
        CheckpointError: A rank could not write: on all ranks, and nothing was published.
    """
    partial = folder.partial(manifest.step)
    digests: dict[str, str] = {}
    with _all_or_none(channel, f"checkpoint of step {manifest.step} not saved"):
        if channel.rank == 0:
            write_documents(folder.begin(manifest.step))
            documents = (path for path in partial.rglob("*") if path.is_file())
            digests |= {path.relative_to(partial).as_posix(): file_digest(path) for path in documents}
    with _all_or_none(channel, f"checkpoint of step {manifest.step} not saved"), _quiet():
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        save(shares, storage_writer=writer, process_group=channel.group, no_dist=channel.group is None)
        mine = partial.glob(f"shard-{channel.rank + 1:05d}-*")
        digests |= {path.name: file_digest(path) for path in mine}
    files = {name: digest for part in channel.gather_objects(digests) for name, digest in part.items()}
    with _all_or_none(channel, f"checkpoint of step {manifest.step} not published"):
        if channel.rank == 0:
            folder.publish(manifest.step, manifest.completed(describe(shares), files))


def verify_checkpoint(path: Path, strategy: Strategy) -> Manifest:
    """Reads all of a checkpoint's files, shared out over the ranks, against their checksums. Every rank.

    Raises:
        CheckpointError: One is damaged or missing; on all ranks.
    """
    manifest = read_manifest(path)
    mine = sorted(manifest.files)[strategy.rank :: strategy.world_size]
    bad = damaged_files(path, manifest.files, mine)
    refuse_damaged(path, [text for part in strategy.gather_objects(bad) for text in part])
    return manifest


def read_tensors(path: Path, manifest: Manifest, names: Iterable[str]) -> dict[str, Tensor]:
    """Whole tensors of a verified checkpoint, on the host, whoever wrote their rows. Local, without a process group.

    Raises:
        CheckpointError: It holds no tensor of one of these names.
    """
    tensors = {}
    for name in names:
        if name not in manifest.tensors:
            raise CheckpointError(f"{path} holds no tensor {name}; write the settings of its {CONFIG}")
        shape, dtype = manifest.tensors[name]
        tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
    with _quiet():
        load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    return tensors


def load_checkpoint(
    path: Path, manifest: Manifest, model: nn.Module, optimizer: Optimizer | None, strategy: Strategy
) -> None:
    """Reads a verified checkpoint into a built model and its optimizer. Every rank.

    Args:
        path: The checkpoint's folder.
        manifest: Its manifest.
        model: The model, without its strategy's wrapper; it may be spread otherwise than when it was saved.
        optimizer: Its optimizer; a fresh one will do. None reads the model only.
        strategy: How both are spread.

    Raises:
        CheckpointError: The checkpoint is of another model; nothing has been changed.
    """
    wanted = {name: what for name, what in manifest.tensors.items() if optimizer or name.startswith("model.")}
    shares = empty_state(model, strategy, moments=any(name.startswith("moments.") for name in wanted))
    _check_same_tensors(path, wanted, describe(shares))
    with _quiet():
        load(shares, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=strategy.world_size == 1)
    write_state(shares, model, optimizer, strategy)


def _check_same_tensors(path: Path, theirs: Outlines, ours: Outlines) -> None:
    if theirs == ours:
        return
    different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    name = different[0]
    raise CheckpointError(
        f"{path} is of another model: {len(different)} tensors differ, the first is {name}: {theirs.get(name)} in the "
        f"checkpoint, {ours.get(name)} in this run; write the settings of its {CONFIG}, or --checkpoint.resume never"
    )


@contextmanager
def _all_or_none(channel: Channel, what: str) -> Iterator[None]:
    """Raises CheckpointError on every rank if one of them raised inside. Every rank."""
    mine = ""
    try:
        yield
    except CheckpointException as error:  # no Exception: torch's sum of what went wrong on the ranks
        mine = "; ".join(f"rank {rank}: {_one_line(reason)}" for rank, (reason, _) in error.failures.items())
    except Exception as error:  # a full disk speaks through several libraries, each with errors of its own
        mine = f"rank {channel.rank}: {_one_line(error)}"
    failed = dict.fromkeys(text for text in channel.gather_objects(mine) if text)
    if failed:
        raise CheckpointError(f"{what}: {'; '.join(failed)}")


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch.distributed.checkpoint's notes for its own developers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed")
        yield
