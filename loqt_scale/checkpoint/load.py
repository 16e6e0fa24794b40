"""A checkpoint's tensors into a model, once everything about them has been checked.

manifest    types, ranges, names                        read_manifest
model       shapes and dtypes are this model's          check_tensors      before anything is allocated
headers     every row is in a file once                 Checkpoint.pieces  before anything is allocated
checksums   every byte is what was saved                verify_checkpoint  each host reads it all, its ranks in turn
text        the run's, at its place                     seek_text          before a run's folder is changed
numbers     neither NaN nor infinity                    check_numbers      before a run's folder is changed; and again
                                                        load_checkpoint    before the model is changed
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loqt_scale.checkpoint.files import ELSEWHERE, CheckpointError
from loqt_scale.checkpoint.folder import CONFIG, DATA
from loqt_scale.checkpoint.opened import Checkpoint
from loqt_scale.checkpoint.shards import read_rows
from loqt_scale.checkpoint.state import MOMENTS, expected_state, write_state
from loqt_scale.data import AnotherTextError, TrainStream
from loqt_scale.functional.schemes import Scheme
from loqt_scale.functional.shares import shard_range
from loqt_scale.layers import loqt_layers
from loqt_scale.optim import moment_names
from loqt_scale.strategies import Comm, Editing


def open_checkpoint(path: Path, comm: Comm) -> Checkpoint:
    """Opens and verifies a checkpoint. Every rank.

    Raises:
        CheckpointError: It cannot be used; on all ranks.
    """
    checkpoint, text = None, ""
    try:
        checkpoint = Checkpoint(path)
    except CheckpointError as error:
        text = str(error)
    _refuse_together(comm, text)
    assert checkpoint is not None
    verify_checkpoint(checkpoint, comm)
    return checkpoint


def verify_checkpoint(checkpoint: Checkpoint, comm: Comm) -> None:
    """Reads all of a checkpoint's files against its manifest; ranks of one host share them out. Every rank.

    Raises:
        CheckpointError: One is damaged, missing, a link, or holds other tensors; on all ranks.
    """
    text = ""
    try:
        checkpoint.pieces  # noqa: B018 (headers first: they are short, and bound what is read)
    except CheckpointError as error:
        text = str(error)
    _refuse_together(comm, text)
    hosts = comm.gather_objects(_host())
    peers = [rank for rank, host in enumerate(hosts) if host == hosts[comm.rank]]
    mine = list(checkpoint.files)[peers.index(comm.rank) :: len(peers)]
    bad = sorted({text for part in comm.gather_objects(checkpoint.files.damaged(mine)) for text in part})
    if bad:
        raise checkpoint.files.error(*bad)
    if comm.is_main and (strays := checkpoint.unlisted()):
        names = ", ".join(map(ascii, strays[:5]))
        print(f"WARNING: {checkpoint.path} holds files that are not of it, and are ignored: {names}", file=sys.stderr)


def seek_text(checkpoint: Checkpoint, text: TrainStream) -> None:
    """Goes to where a checkpoint's run stood in its text, which nobody has read from yet. Every rank.

    Raises:
        CheckpointError: It is another text, or has no such place.
    """
    position = checkpoint.position()
    if position is None:
        return
    try:
        text.seek(checkpoint.manifest.step, position)
    except AnotherTextError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from None
    except ValueError as error:
        raise checkpoint.files.error(f"{DATA} is no place in this data set ({error})") from None


def check_tensors(
    checkpoint: Checkpoint,
    model: nn.Module,
    *,
    moments: bool = False,
    momentum_only: Collection[str] = (),
) -> list[str]:
    """The names of a checkpoint's tensors that a model takes. Local; it may be on the meta device, or spread.

    Args:
        checkpoint: The checkpoint.
        model: The model, without its strategy's wrapper.
        moments: Whether the optimizer's moments are wanted too, if there are any.
        momentum_only: Parameters that have one moment instead of two (see `optim.momentum_only`).

    Raises:
        CheckpointError: It is of another model.
    """
    theirs = {k: v for k, v in checkpoint.manifest.tensors.items() if moments or k.startswith("model.")}
    has_moments = any(name.startswith("moments.") for name in theirs)
    ours = expected_state(model, moments=has_moments, momentum_only=momentum_only)
    different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if different:
        name = different[0]
        raise CheckpointError(
            f"{checkpoint.path} is of another model: {len(different)} tensors differ, the first is {name}: "
            f"{theirs.get(name)} in the checkpoint, {ours.get(name)} in this run; write the settings of its {CONFIG}, "
            "or checkpoint.resume: never"
        )
    return list(theirs)


def check_numbers(checkpoint: Checkpoint, model: nn.Module, comm: Comm) -> None:
    """Looks at all numbers of a verified checkpoint, one tensor at a time; ranks share its rows out. Every rank.

    Args:
        checkpoint: The checkpoint; its tensors have been found to be the model's.
        model: The model, perhaps on the meta device.
        comm: Its ranks.

    Raises:
        CheckpointError: One is NaN or infinite, or the checkpoint has changed since it was verified; on all ranks.
    """
    text = ""
    try:
        for name, (shape, _) in checkpoint.manifest.tensors.items():
            wanted = {name: shard_range(shape[0], comm.rank, comm.world_size)}
            rows = read_rows(checkpoint.files, checkpoint.manifest, checkpoint.pieces, wanted)
            refuse_not_finite(checkpoint, rows, model)
    except CheckpointError as error:
        text = str(error)
    _refuse_together(comm, text)


def load_checkpoint(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer | None, editing: Editing) -> None:
    """Reads a verified checkpoint into a built model and its optimizer. Every rank.

    Args:
        checkpoint: The checkpoint.
        model: The model, without its strategy's wrapper; it may be spread otherwise than when it was saved.
        optimizer: Its optimizer; a fresh one will do. None reads the model only.
        editing: How both are spread.

    Raises:
        CheckpointError: The checkpoint is of another model, holds a number that is not finite, or has changed since it
            was verified: on all ranks, and nothing has been changed.
    """
    single: list[str] = []
    if optimizer is not None:
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        single = [name for name, parameter in trained if len(moment_names(optimizer, parameter)) == 1]
    names = check_tensors(checkpoint, model, moments=optimizer is not None, momentum_only=single)
    shares, text = {}, ""
    try:
        wanted = _wanted_rows(names, model, editing)
        shares = read_rows(checkpoint.files, checkpoint.manifest, checkpoint.pieces, wanted)
        refuse_not_finite(checkpoint, shares, model)
    except CheckpointError as error:
        text = str(error)
    _refuse_together(editing.comm, text)
    write_state(shares, model, optimizer, editing)


def _wanted_rows(names: Iterable[str], model: nn.Module, editing: Editing) -> dict[str, tuple[int, int]]:
    """Rows of each tensor that this rank brings: those of its parameter, which its moments are cut with. Local."""
    rows = {name: editing.rows_to_fill(parameter) for name, parameter in model.named_parameters()}
    moments = {f"moments.{name}.{key}": of for name, of in rows.items() for key in MOMENTS}
    known = moments | {f"model.{name}": of for name, of in rows.items()}
    return {name: known[name] for name in names}


def read_tensors(checkpoint: Checkpoint, names: Iterable[str], model: nn.Module) -> dict[str, Tensor]:
    """Whole tensors of a verified checkpoint, on the host, whoever wrote their rows. Local, without a process group.

    Args:
        checkpoint: The checkpoint.
        names: Of tensors that `check_tensors` found.
        model: The model that they are of, perhaps on the meta device.

    Raises:
        CheckpointError: One holds a number that is not finite, or the checkpoint has changed since it was verified.
    """
    wanted = {name: (0, checkpoint.manifest.tensors[name][0][0]) for name in names}
    tensors = read_rows(checkpoint.files, checkpoint.manifest, checkpoint.pieces, wanted)
    refuse_not_finite(checkpoint, tensors, model)
    return tensors


def refuse_not_finite(checkpoint: Checkpoint, tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raises CheckpointError if a tensor of a model, packed or not, holds NaN or infinity."""
    packed = _packed_numbers(model)
    for name, tensor in tensors.items():
        numbers = packed[name].floats(tensor) if name in packed else tensor
        if numbers.is_floating_point() and not bool(torch.isfinite(numbers).all()):
            raise CheckpointError(f"{checkpoint.path}: {name} holds NaN or infinity; {ELSEWHERE}")


def _packed_numbers(model: nn.Module) -> dict[str, Scheme]:
    """Which of a model's byte tensors hold floating-point numbers, and the scheme that reads them."""
    schemes = {}
    for layer, module in loqt_layers(model):
        for which, layout in (("base", module.spec.base), ("projection", module.spec.projection)):
            part = "codes" if layout.scales_shape is None else "scales"
            schemes[f"model.{layer}.{which}.{part}"] = layout.kind
    return schemes


def _refuse_together(comm: Comm, text: str) -> None:
    """Raises CheckpointError on every rank if one of them has something to say. Every rank."""
    if texts := dict.fromkeys(text for text in comm.gather_objects(text) if text):
        raise CheckpointError("; ".join(texts))


def _host() -> str:
    """The same on the ranks of one machine, containers or not."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        return socket.gethostname()
