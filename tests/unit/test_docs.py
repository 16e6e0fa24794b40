"""What the documents name is there: modules, and names of modules and classes."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "loqt_scale"
DOCUMENTS = sorted(path for path in (ROOT / "docs").glob("*.md") if path.stem != "decisions")  # those are history


def names_in(tree: ast.AST) -> set[str]:
    """All that is defined, assigned or imported."""
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    named = (ast.FunctionDef, ast.ClassDef, ast.alias)
    return found | {node.name for node in ast.walk(tree) if isinstance(node, named)}


@cache
def classes() -> dict[str, set[str]]:
    """What each class and its bases have, by the class's name."""
    nodes = [
        node
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    own = {node.name: names_in(node) for node in nodes}
    for _ in range(4):  # a base's bases
        for node in nodes:
            own[node.name] |= set().union(*(own.get(getattr(base, "id", ""), set()) for base in node.bases))
    return own


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_what_a_document_names_is_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    missing = []
    for module, name in re.findall(r"\b([a-z_]+(?:/[a-z_0-9]+)+)\.(\w+)\b", text):
        file = PACKAGE / f"{module.removeprefix('loqt_scale/')}.py"
        if name == "py" and module.split("/")[0] in {"loqt_scale", *(each.name for each in PACKAGE.iterdir())}:
            missing += [] if file.exists() or (ROOT / f"{module}.py").exists() else [f"{module}.py"]
        elif file.exists() and name not in ("py", *names_in(ast.parse(file.read_text(encoding="utf-8")))):
            missing.append(f"{module}.{name}")
    for owner, name in re.findall(r"\b([A-Z]\w+)\.(\w+)\b", text):
        if owner in classes() and name not in classes()[owner]:
            missing.append(f"{owner}.{name}")
    assert not missing
