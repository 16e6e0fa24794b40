"""Checkpoints with something else in them, and checksums that are right again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

SHARD = "shard-00001-model-00001-of-00001.safetensors"


def forge(path: Path, edit: Callable[[dict[str, Any]], object] = lambda tree: None) -> None:
    """Edits a manifest and makes all its checksums right."""
    tree = json.loads((path / "manifest.json").read_text())
    tree.pop("sha256", None)
    for name in tree["files"]:
        tree["files"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
        tree["sizes"][name] = (path / name).stat().st_size
    edit(tree)
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(tree | {"sha256": digest}))


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], object], shard: str = SHARD) -> None:
    """Edits the tensors of a shard, checksums right."""
    with safe_open(path / shard, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path / shard).items()}
    edit(tensors)
    save_file(tensors, path / shard, metadata=metadata)
    forge(path)
