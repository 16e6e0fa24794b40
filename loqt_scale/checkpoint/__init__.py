"""Checkpoints: what of a run is kept, where, and how it goes on from there.

state.py     the tensors of a run, whatever the strategy: every rank its share of each one's rows
write.py     those shares to safetensors files (torch.distributed.checkpoint)
saver.py     saves a run now and then, in the background if asked to
folder.py    folders and names: written beside, published by one rename; lines that a run leaves are set aside
lines.py     from one line to another: copies first, then what decides, then moves
records.py   how a run began and how it ended
changes.py   which settings may change on the way
resume.py    where a run starts: from nothing, from a checkpoint, or not at all

A checkpoint may come from a stranger, so it is read by other means than it is written:

manifest.py  what it says about itself: a schema
files.py     its files: listed, regular, inside the folder, never through a link
shards.py    which file holds which rows of a tensor
opened.py    one that is open: what is read of it is what has been verified
load.py      its tensors into a model, once everything about them has been checked
"""

from loqt_scale.checkpoint.files import CheckpointError
from loqt_scale.checkpoint.folder import CHECKPOINTS, CONFIG, DATA, HUGGINGFACE, CheckpointFolder, locate_checkpoint
from loqt_scale.checkpoint.lines import LineChange
from loqt_scale.checkpoint.load import (
    check_numbers,
    check_tensors,
    load_checkpoint,
    open_checkpoint,
    read_tensors,
    seek_text,
    verify_checkpoint,
)
from loqt_scale.checkpoint.manifest import FORMAT, Manifest, read_manifest
from loqt_scale.checkpoint.opened import Checkpoint, read_settings
from loqt_scale.checkpoint.records import Begun, Finished, identity
from loqt_scale.checkpoint.resume import Start, decide_start
from loqt_scale.checkpoint.saver import CheckpointSaver

__all__ = [
    "CHECKPOINTS",
    "CONFIG",
    "DATA",
    "FORMAT",
    "HUGGINGFACE",
    "Begun",
    "Checkpoint",
    "CheckpointError",
    "CheckpointFolder",
    "CheckpointSaver",
    "Finished",
    "LineChange",
    "Manifest",
    "Start",
    "check_numbers",
    "check_tensors",
    "decide_start",
    "identity",
    "load_checkpoint",
    "locate_checkpoint",
    "open_checkpoint",
    "read_manifest",
    "read_settings",
    "read_tensors",
    "seek_text",
    "verify_checkpoint",
]
