"""The rooms stand in a row: imports go one way and in no circle, and no function outgrows one idea."""

import ast
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("data", "models", "stages", "eval", "recipes", "cli", "api")
MAX_LINES = 60
SHARED = [file for file in sorted(ROOT.glob("*.py")) if file.stem not in ("__init__", "setup")]
"""What every room may import: the modules of the root, which import no room themselves."""
FILES = SHARED + [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]


def place(file: Path) -> str:
    return str(file.relative_to(ROOT))


def module_name(file: Path) -> str:
    """`preftune.data.rows`; a package's `__init__.py` goes by the package's name."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(("preftune", *(part for part in parts if part != "__init__")))


MODULES = {module_name(file): file for file in FILES}


def imported_names(tree: ast.AST, file: Path) -> list[str]:
    """Dotted names that a module imports anywhere in it, relative ones made absolute (`preftune.data.rows.Row`)."""
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


def imported_modules(file: Path) -> set[str]:
    """Which of `MODULES` it imports, at the top, in a function or for type checking alone."""
    found = set()
    for name in imported_names(ast.parse(file.read_text(encoding="utf-8")), file):
        known = name if name in MODULES else name.rpartition(".")[0]
        if known in MODULES:
            found.add(known)
    return found


def circles(imports: Mapping[str, set[str]]) -> list[tuple[str, ...]]:
    """The groups of modules that reach one another."""
    reached: dict[str, set[str]] = {}
    for module in imports:
        found, ahead = set(), list(imports[module])
        while ahead:
            if (each := ahead.pop()) not in found:
                found.add(each)
                ahead += imports[each]
        reached[module] = found
    return sorted(
        {
            tuple(sorted(other for other in reached[module] if module in reached[other]))
            for module in imports
            if module in reached[module]
        }
    )


@pytest.mark.parametrize("file", FILES, ids=place)
def test_imports_go_left_to_right(file: Path):
    first = file.relative_to(ROOT).parts[0]
    room = ROOMS.index(first) if first in ROOMS else -1
    names = imported_names(ast.parse(file.read_text(encoding="utf-8")), file)
    ours = [name.split(".") for name in names if name.startswith("preftune.")]
    wrong = [".".join(name) for name in ours if name[1] in ROOMS and ROOMS.index(name[1]) > room]
    assert not wrong, f"{place(file)} imports {', '.join(wrong)}, which stands to its right"


def test_relative_imports_are_understood():
    tree = ast.parse("from ..models.base import Base\nfrom . import keys\nfrom .. import stages\nimport torch")
    names = imported_names(tree, ROOT / "data" / "x.py")
    assert names == ["preftune.models.base.Base", "preftune.data.keys", "preftune.stages", "torch"]


def test_nothing_imports_in_a_circle():
    found = circles({name: imported_modules(file) for name, file in MODULES.items()})
    assert not found, "\n".join(["import one another:", *(" ".join(each) for each in found)])


def test_circles_are_found_whatever_their_length_and_nothing_else():
    imports = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": set(), "f": {"f"}}
    assert circles(imports) == [("a", "b", "c"), ("f",)]


@pytest.mark.parametrize("file", FILES, ids=place)
def test_no_function_is_two_ideas(file: Path):
    functions = [
        node
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lines = [(each.name, (each.end_lineno or each.lineno) - each.lineno + 1) for each in functions]
    found = [f"{name} ({count} lines)" for name, count in lines if count > MAX_LINES]
    assert not found, f"{place(file)}: {', '.join(found)}; at most {MAX_LINES}: split it"
