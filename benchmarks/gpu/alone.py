"""preftune beside a Python that has torch and little else, without a network and without installing into it:

    python3 benchmarks/gpu/alone.py WHEELS ARGUMENTS OF gpu-check

WHEELS is the folder that `make gpu-wheels` fills. They are unpacked into a folder of their own, this repository is the
package `preftune` there, and both stand before what that Python has. Only the standard library is imported here.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def prepared(wheels: Path, site: Path) -> Path:
    """A folder for PYTHONPATH with all that the wheels hold and this repository; made once, for those wheels."""
    files = sorted(wheels.glob("*.whl"))
    if not files:
        sys.exit(f"gpu-check: {wheels} holds no wheel: `make gpu-wheels` fills it where there is a network")
    done, names = site / "installed", "\n".join(each.name for each in files)
    if not done.is_file() or done.read_text(encoding="utf-8") != names:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        command += ["--disable-pip-version-check", "--no-cache-dir", "--upgrade", "--target", str(site)]
        subprocess.run([*command, *map(str, files)], check=True)
        done.write_text(names, encoding="utf-8")
    package = site / "preftune"
    if not package.is_symlink():
        package.symlink_to(ROOT, target_is_directory=True)
    return site


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} WHEELS [ARGUMENTS OF gpu-check]")
    site = prepared(Path(sys.argv[1]), Path(os.environ.get("PREFTUNE_SITE") or "/tmp/preftune-gpu-site"))
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    python = [sys.executable, "-m"]
    # what is out of bounds is said, and tried all the same
    subprocess.run([*python, "preftune.benchmarks.gpu.wheels", "check"], env=environment, check=False)
    done = subprocess.run([*python, "preftune.benchmarks.gpu", *sys.argv[2:]], env=environment, check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
