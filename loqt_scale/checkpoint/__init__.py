"""Checkpoints: what of a run is kept, where, and how it goes on from there.

state.py     the tensors of a run, whatever the strategy: every rank its share of each one's rows
store.py     those shares to and from safetensors files (torch.distributed.checkpoint)
saver.py     saves a run now and then, in the background if asked to
files.py     its files: regular, inside the folder, never through a link; checksums
manifest.py  what it says about itself: a schema, checked as data from a stranger
folder.py    folders and names: written beside, published by one rename
resume.py    which checkpoint a run goes on from, and whether it may
"""

from loqt_scale.checkpoint.files import CheckpointError
from loqt_scale.checkpoint.folder import CHECKPOINTS, CONFIG, DATA, HUGGINGFACE, locate_checkpoint
from loqt_scale.checkpoint.manifest import FORMAT, Manifest, read_manifest
from loqt_scale.checkpoint.resume import find_resume
from loqt_scale.checkpoint.saver import CheckpointSaver
from loqt_scale.checkpoint.store import load_checkpoint, read_tensors, verify_checkpoint

__all__ = [
    "CHECKPOINTS",
    "CONFIG",
    "DATA",
    "FORMAT",
    "HUGGINGFACE",
    "CheckpointError",
    "CheckpointSaver",
    "Manifest",
    "find_resume",
    "load_checkpoint",
    "locate_checkpoint",
    "read_manifest",
    "read_tensors",
    "verify_checkpoint",
]
