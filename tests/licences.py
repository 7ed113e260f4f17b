"""Under which licences what we need is distributed: writes docs/licences.md from what is installed.

python tests/licences.py   # in an environment with every extra; what is not installed keeps its line
"""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "licences.md"
DEVELOPMENT = ("test", "docs", "benchmarks")
"""Extras whose packages work on the repository and are no part of what a user runs."""
HEAD = """# Licences of what preftune needs

preftune is under [Apache-2.0](../LICENSE). Its wheel holds none of these packages: pip fetches them from their makers.
Written by `python tests/licences.py` from the packages' own metadata; a scanner says what each of them needs in turn.

| package | for | licence |
|---|---|---|
"""
_CLASSIFIED = {
    "Apache 2.0 License": "Apache-2.0",
    "GNU General Public License v3 (GPLv3)": "GPL-3.0",
    "Apache Software License": "Apache-2.0",
    "MIT License": "MIT",
    "BSD License": "BSD",
    "ISC License (ISCL)": "ISC",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}


def needed() -> dict[str, list[str]]:
    """Each package that pyproject.toml names, with what it is for: the extras, or `preftune` itself."""
    said = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, list[str]] = {}
    for what, lines in [("preftune", said["dependencies"]), *said["optional-dependencies"].items()]:
        for line in lines:
            name = re.split(r"[\s<>=!~;\[]", line)[0].lower()
            if name != "preftune" and what not in found.setdefault(name, []):
                found[name].append(what)
    return found


def licence(name: str) -> str | None:
    """As the installed package says it: an expression, a classifier, or its first short line; None: not installed."""
    try:
        said: Any = metadata(name)
    except PackageNotFoundError:
        return None
    if expression := said.get("License-Expression"):
        return expression
    marks = [each.rpartition(" :: ")[2] for each in said.get_all("Classifier") or () if each.startswith("License ::")]
    if known := [_CLASSIFIED[each] for each in marks if each in _CLASSIFIED]:
        return " AND ".join(known)
    first = " ".join((said.get("License") or "not said").splitlines()[0].split())[:60]
    return _CLASSIFIED.get(first, first)


def listed() -> dict[str, str]:
    """The licence of every package in the page."""
    if not PAGE.is_file():
        return {}
    rows = re.findall(r"^\| (\S+) \| [^|]* \| ([^|]*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: said for name, said in rows if name != "package"}


def page() -> str:
    before = listed()
    lines = []
    for name, uses in sorted(needed().items()):
        said = licence(name) or before.get(name, "not installed when this was written")
        lines.append(f"| {name} | {', '.join(uses)} | {said} |\n")
    return HEAD + "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
