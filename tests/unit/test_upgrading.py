"""docs/upgrading.md names every private name of others that the package relies on, and none that it does not."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "loqt_scale").rglob("*.py"))
TABLE = ROOT / "docs" / "upgrading.md"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.AST) -> Iterator[str]:
    """What the package gives names to itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def used(tree: ast.AST) -> Iterator[str]:
    """Private attributes, also those that are asked for by a string, and private modules that are imported from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("os", "sys"):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("loqt_scale"):
            yield from (*(node.module or "").split("."), *(alias.name for alias in node.names))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            yield from (word.value for word in node.args[1:2] if isinstance(word, ast.Constant))


def test_private_names_of_others_are_those_of_the_table() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES]
    ours = {name for tree in trees for name in defined(tree)}
    found = {name for tree in trees for name in used(tree) if is_private(name)} - ours
    rows = [line.split(" | ") for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert len(rows) > 30
    listed = {word for row in rows for word in re.findall(r"\w+", row[0])}
    assert found - listed == set(), "write them into docs/upgrading.md, with the reason and what would notice"
    code = {word for path in SOURCES for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))}
    named = {re.findall(r"\w+", name)[-1] for row in rows for name in re.findall("`([^`]+)`", row[0])}
    assert named - code == set(), "nothing relies on these any more; take them out of docs/upgrading.md"


def test_the_table_names_files_and_tests_that_are_there() -> None:
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = line.split(" | ")
        if not line.startswith("| `"):
            continue
        folder = ""
        for module in re.findall(r"`([\w/]+\.py)`", cells[1]):
            folder = f"{Path(module).parent}/" if "/" in module else folder
            assert (ROOT / "loqt_scale" / folder / Path(module).name).is_file(), (cells[0], module)
        for test in re.findall(r"(test_\w+)\.py", cells[-1]):
            assert list((ROOT / "tests").rglob(f"{test}.py")), (cells[0], test)
