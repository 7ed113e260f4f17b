"""Wheels for a CUDA machine without a network: gathered where there is one, looked at where they are used.

    python -m preftune.benchmarks.gpu.wheels gather .wheels       here, in the environment that tests run in
    python -m preftune.benchmarks.gpu.wheels check                there: does all that is needed stand in its bounds?

Gathered is what preftune needs, in the versions of constraints.txt, without torch and what comes with it and without
the large packages that such a machine has beside it (`THERE`).
"""

import argparse
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 64 << 20
"""What one loan of a machine may be handed, the repository itself counted in."""
THERE = ("torch", "numpy", "scipy", "pandas", "pyarrow")
"""Not gathered, unless asked for: together they are four times as large as all the rest."""
TESTS = ("pytest",)
"""What the tests of the card need besides."""
_GLIBC = ("_2_39", "_2_35", "_2_34", "_2_31", "_2_28", "_2_27", "_2_24", "_2_17", "2014", "_2_12", "1")
PLATFORMS = tuple(f"manylinux{tag}_x86_64" for tag in _GLIBC)
"""pip takes each of these tags by itself, not the older ones with it."""


def canonical(name: str) -> str:
    """A distribution's name as packaging compares it, of a requirement without its version and extras."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!~;\[(]", name.strip())[0]).lower()


def project() -> list[str]:
    """What pyproject.toml says that preftune needs."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]


def needed(names: Iterable[str], without: Iterable[str]) -> list[str]:
    """These distributions and all that they need, as they are installed here; not those `without`, nor theirs."""
    left, found = {canonical(each) for each in names}, set[str]()
    out = {canonical(each) for each in without}
    while left:
        name = left.pop()
        if name in out | found:
            continue
        try:
            requirements = requires(name) or []
        except PackageNotFoundError:  # of another platform or an older Python
            continue
        found.add(name)
        left |= {canonical(each) for each in requirements if "extra" not in each.partition(";")[2]}
    return sorted(found)


def gather(folder: Path, also: Iterable[str], python: str) -> None:
    """Fill the folder. Ends in words where it would be too large to travel."""
    asked = {canonical(each) for each in also}
    names = needed([*project(), *TESTS, *asked], {canonical(each) for each in THERE} - asked)
    for old in folder.glob("*.whl"):
        old.unlink()
    platforms = [word for each in PLATFORMS for word in ("--platform", each)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]
    command += ["--dest", str(folder), *(f"{name}=={version(name)}" for name in names)]
    subprocess.run(command, check=True)
    size = sum(file.stat().st_size for file in folder.glob("*.whl"))
    tree = _tracked_bytes()
    print(
        f"{folder}: {len(names)} wheels for Python {python}, {size / 2**20:.1f} MiB; repository {tree / 2**20:.1f} MiB"
    )
    print(f"taken to be there: {', '.join(each for each in THERE if each not in asked)}, and what comes with them")
    if size + tree > MOST_BYTES:
        sys.exit(f"gpu-wheels: more than {MOST_BYTES >> 20} MiB with the repository: gather fewer")


def _tracked_bytes() -> int:
    """What of the repository travels."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    return sum((ROOT / name).stat().st_size for name in listed.splitlines() if (ROOT / name).is_file())


def problems(requirements: Iterable[str]) -> list[str]:
    """Which requirements are not met by what is installed: not there, or out of bounds."""
    found = []
    for each in requirements:
        name, bounds = canonical(each), re.findall(r"(>=|<=|<|>|==)\s*([\w.]+)", each.partition(";")[0])
        try:
            has = version(name)
        except PackageNotFoundError:
            found.append(f"{name} is not installed, expected {each}")
            continue
        if not all(_holds(_number(has), how, _number(bound)) for how, bound in bounds):
            found.append(f"{name} is {has}, expected {each}")
    return found


def _number(text: str) -> tuple[int, ...]:
    """A version's numbers, without what stands behind them and without trailing zeros."""
    numbers = [int(each) for each in re.split(r"[^\d.]", text)[0].split(".") if each]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _holds(has: tuple[int, ...], how: str, bound: tuple[int, ...]) -> bool:
    return {">=": has >= bound, "<=": has <= bound, "<": has < bound, ">": has > bound, "==": has == bound}[how]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("gather", "check"))
    parser.add_argument("folder", type=Path, nargs="?", default=Path(".wheels"))
    parser.add_argument("--also", nargs="+", default=[], help=f"of {', '.join(THERE)} (torch apart), or others")
    parser.add_argument("--python", default="3.12")
    args = parser.parse_args()
    if args.what == "gather":
        gather(args.folder, args.also, args.python)
        return
    for line in (found := problems(project())):
        print(f"gpu-check: {line}", file=sys.stderr)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
