"""An opened checkpoint: what others read of it they read here, and it is what has been verified.

Settings, tokenizer and the like are read once, verified, and copied to a private folder, where nobody can change them,
add to them or link them elsewhere; libraries that want a folder get that one. Tensors are read in place (`shards.py`).
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import from_json

from loqt_scale.checkpoint.files import ELSEWHERE, CheckpointError, ListedFiles
from loqt_scale.checkpoint.folder import CONFIG, DATA
from loqt_scale.checkpoint.manifest import MANIFEST, read_manifest
from loqt_scale.checkpoint.shards import Pieces, find_pieces
from loqt_scale.config import RunConfig
from loqt_scale.config.yaml import load_run_config
from loqt_scale.errors import ConfigError

_DEEPEST = 20  # brackets within brackets in a config.yaml; settings need 3
_LONGEST = 2**24  # bytes of a config.yaml; it may name many files of text


class Checkpoint:
    """A checkpoint whose manifest has been read. Its files are verified when they are read; shards by `shards.py`.

    Args:
        path: Its folder.

    Raises:
        CheckpointError: There is no manifest that could be one.

    Attributes:
        manifest: What it says about itself.
        files: The files that the manifest lists.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.manifest = path, read_manifest(path)
        self.files = ListedFiles(path, self.manifest.files, self.manifest.sizes)

    def follow(self, path: Path) -> None:
        """Its folder has been moved; its files are still those that were verified."""
        self.path, self.files.folder = path, path

    @cached_property
    def pieces(self) -> Pieces:
        """Which file holds which rows; see `find_pieces`."""
        return find_pieces(self.files, self.manifest)

    @cached_property
    def side_files(self) -> Path:
        """A private folder with verified copies of all files but the shards; it goes when this object does.

        Raises:
            CheckpointError: One is missing or damaged.
        """
        folder = Path(tempfile.mkdtemp(prefix="loqt-scale-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        for name in self.manifest.side_files:
            copy = folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(self.files.read(name))
        return folder

    def settings(self) -> RunConfig:
        """The settings of the run that saved it.

        Raises:
            CheckpointError: There are none, or they cannot be read.
        """
        if CONFIG not in self.files:
            raise CheckpointError(f"{self.path} has no {CONFIG}; {ELSEWHERE}")
        try:
            return read_settings(self.side_files / CONFIG)
        except ConfigError as error:
            reason = str(error).replace(str(self.side_files / CONFIG), CONFIG)
            raise CheckpointError(f"{self.path / CONFIG} cannot be read: {reason}; {ELSEWHERE}") from None

    def position(self) -> Any:
        """Where the run's data went on, plain data that the data set has to check; None if it needs nothing.

        Raises:
            CheckpointError: It is no JSON.
        """
        if DATA not in self.files:
            return None
        text = self.files.read(DATA)
        try:
            return from_json(text)  # unlike json, of limited depth
        except ValueError as error:
            raise self.files.error(f"{DATA} is no JSON ({error})") from None

    def unlisted(self) -> list[str]:
        """Files and links in its folder that its manifest does not list. They are never opened."""
        return [name for name in self.files.unlisted() if name != MANIFEST]


def read_settings(path: Path) -> RunConfig:
    """A run's settings in a file that may be a stranger's.

    Raises:
        ConfigError: As `load_run_config`; or the file is too large, or YAML that unfolds: what runs write has no
            aliases and little depth.
    """
    text, depth = path.read_bytes(), 0
    if len(text) > _LONGEST:
        raise ConfigError(f"{path} is larger than {_LONGEST >> 20} MiB")
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > _DEEPEST:
                raise ConfigError(f"{path} holds aliases, or brackets too deep; no run writes such settings")
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    return load_run_config(path)
