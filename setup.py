"""What pyproject.toml cannot say: this folder is the package `preftune`, and the packages in it are found, not listed.

A folder is a package when it has an `__init__.py`. A package's data is every other file in its folder, and in the
folders below that are no packages themselves; hidden files and those of `NO_DATA` stay out.

Where the repository lies is not written down either: it is PREFTUNE_REPOSITORY, or where this clone came from. The page
of a package index has its addresses from there, and README's relative links lead there; where it is not known, README
has no links and images that would lead nowhere.
"""

import os
import re
import subprocess
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
NO_DATA = ("benchmarks",)
_FENCE = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)(\[(?:[^\[\]]|!?\[[^\]]*\])*\])\((?!https?:|mailto:|#)([^)\s]+)\)")
_IMAGE = re.compile(r"(!\[[^\[\]]*\])\((?!https?:)([^)\s]+)\)")


def data_files(folder: Path) -> list[str]:
    """The files that belong to the package in this folder and are no modules, relative to it."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "__pycache__")):
            continue
        if path.is_file() and path.suffix != ".py":
            found.append(path.name)
        elif path.is_dir() and not (path / "__init__.py").exists():
            found += [f"{path.name}/{name}" for name in data_files(path)]
    return found


def repository(root: Path) -> str | None:
    """The address of the repository's page, without a name or key that may stand in it; None where it is not known."""
    if (built := root / "PKG-INFO").is_file():
        named = re.search(r"^Project-URL: Repository, (\S+)$", built.read_text(encoding="utf-8"), re.MULTILINE)
        return named and named[1]
    said = os.environ.get("PREFTUNE_REPOSITORY")
    if said is None:
        command = ["git", "-C", str(root), "config", "--get", "remote.origin.url"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return None
    found = re.fullmatch(r"(?:(?:https?|ssh|git)://)?(?:[^@/]+@)?([\w.-]+\.[a-z]+)(?::\d+)?[:/](.+?)(?:\.git)?/?", said)
    return found and f"https://{found[1]}/{found[2]}"


def urls(page: str | None) -> dict[str, str]:
    if page is None:
        return {}
    names = {"Documentation": "tree/HEAD/docs", "Changelog": "blob/HEAD/CHANGELOG.md", "Issues": "issues"}
    return {"Homepage": page, "Repository": page} | {name: f"{page}/{place}" for name, place in names.items()}


def for_index(text: str, page: str | None) -> str:
    """A README as it is shown away from the repository: no relative link or image in it, code untouched."""

    def image(found: re.Match[str]) -> str:
        return "" if page is None else f"{found[1]}({page}/raw/HEAD/{found[2].removeprefix('./')})"

    def link(found: re.Match[str]) -> str:
        return found[1][1:-1] if page is None else f"{found[1]}({page}/blob/HEAD/{found[2].removeprefix('./')})"

    parts = _FENCE.split(text)
    return "".join(part if place % 2 else _LINK.sub(link, _IMAGE.sub(image, part)) for place, part in enumerate(parts))


def main() -> None:
    rooms = find_packages(str(ROOT), exclude=["tests", "tests.*"])
    page = repository(ROOT)
    setup(
        # this file stands among the package's modules and is none: setuptools leaves out the script of this name
        script_name="setup.py",
        packages=["preftune", *(f"preftune.{room}" for room in rooms)],
        package_data={
            "preftune": ["py.typed"],
            **{f"preftune.{room}": data_files(ROOT / room.replace(".", "/")) for room in rooms if room not in NO_DATA},
        },
        long_description=for_index((ROOT / "README.md").read_text(encoding="utf-8"), page),
        long_description_content_type="text/markdown",
        # data is what is named here, not what an sdist holds besides
        include_package_data=False,
        project_urls=urls(page),
    )


if __name__ == "__main__":
    main()
