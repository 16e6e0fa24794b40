"""A DeepSpeed JSON for a test."""

from __future__ import annotations

import itertools
import json

import pytest


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    """Writes a nested dict, or a text, and returns its path."""
    folder = tmp_path_factory.mktemp("zero")
    names = itertools.count()

    def write(content) -> str:
        path = folder / f"{next(names)}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)

    return write
