"""The rooms stand in a row: nothing imports from a room to its right, and no file outgrows one idea."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("data", "models", "stages", "eval", "recipes", "cli")
MAX_LINES = 320
FILES = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]


def imported_modules(tree: ast.AST, file: Path) -> list[str]:
    """Dotted names that a module imports anywhere in it, relative ones made absolute (`preftune.data.rows`)."""
    package = ["preftune", *file.relative_to(ROOT).parts[:-1]]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = [*above, *(node.module.split(".") if node.module else [])]
            found += [".".join([*module, alias.name]) for alias in node.names]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_left_to_right(file: Path):
    room = ROOMS.index(file.relative_to(ROOT).parts[0])
    modules = imported_modules(ast.parse(file.read_text(encoding="utf-8")), file)
    ours = [name.split(".") for name in modules if name.startswith("preftune.")]
    wrong = [".".join(name) for name in ours if name[1] in ROOMS and ROOMS.index(name[1]) > room]
    assert not wrong, f"{file.relative_to(ROOT)} imports {', '.join(wrong)}, which stands to its right"


def test_relative_imports_are_understood():
    tree = ast.parse("from ..models.base import Base\nfrom . import keys\nfrom .. import stages\nimport torch")
    names = imported_modules(tree, ROOT / "data" / "x.py")
    assert names == ["preftune.models.base.Base", "preftune.data.keys", "preftune.stages", "torch"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_outgrows_one_idea(file: Path):
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{file.relative_to(ROOT)} has {lines} lines: split it"
