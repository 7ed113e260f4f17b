"""What pyproject.toml cannot say: this folder is the package `preftune`, and the packages in it are found, not listed.

A folder is a package when it has an `__init__.py`. A package's data is every other file in its folder, and in the
folders below that are no packages themselves; hidden files and those of `NO_DATA` stay out.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
NO_DATA = ("benchmarks",)


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


rooms = find_packages(str(ROOT), exclude=["tests", "tests.*"])
setup(
    # This file stands among the package's modules and is none of them: setuptools leaves out the script of this name.
    script_name="setup.py",
    packages=["preftune", *(f"preftune.{room}" for room in rooms)],
    package_data={
        "preftune": ["py.typed"],
        **{f"preftune.{room}": data_files(ROOT / room.replace(".", "/")) for room in rooms if room not in NO_DATA},
    },
)
