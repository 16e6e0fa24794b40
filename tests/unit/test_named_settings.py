"""A message names a setting as `train.steps`, which is true in YAML, in code and on the command line alike."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from loqt_scale.config.keys import setting_types

PACKAGE = Path(__file__).resolve().parents[2] / "loqt_scale"
OF_THE_COMMAND_LINE = {
    "cli.py",
    "entry.py",
    "config/__init__.py",  # how a run is configured, in all three ways
    "config/commands.py",
    "config/paths.py",  # what shells make of a path
    "config/yaml.py",
    "plan/advice.py",  # its lines are pasted behind the command
}
FLAG = re.compile(r"--([a-z][\w.]*)")
SETTINGS = set(setting_types())


def flags_in(source: str) -> Iterator[str]:
    """Settings that a text of the program, a docstring too, names as flags."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = (name.rstrip(".") for name in FLAG.findall(node.value))
            yield from (name for name in names if name in SETTINGS)


@pytest.mark.parametrize("package", sorted({path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")}))
def test_no_domain_package_names_a_flag(package: str) -> None:
    folder = PACKAGE / package
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.py"))
    names = {str(path.relative_to(PACKAGE)): path for path in files}
    found = {name: set(flags_in(path.read_text("utf-8"))) for name, path in names.items()}
    assert {name: flags for name, flags in found.items() if flags and name not in OF_THE_COMMAND_LINE} == {}


@pytest.mark.parametrize(
    ("source", "flags"),
    [
        ('raise ValueError(f"write another --train.run_dir")', ["train.run_dir"]),
        ('f"{a}; write --method full, or --train.steps {b}"', ["method", "train.steps"]),
        ('f"write train.steps: {a}; or run loqt-scale plan --gpus {b} --train_all"', []),
        ("# --train.steps\nx = 1", []),
    ],
)
def test_a_flag_would_be_noticed(source: str, flags: list[str]) -> None:
    assert list(flags_in(source)) == flags
