"""Builds the shadow device's library with g++ against the torch that is installed; once for each source and torch."""

import hashlib
import os
import shutil
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("shadow.cpp")


def why_not() -> str | None:
    """Why it cannot be built here; None where it can."""
    if shutil.which("g++") is None:
        return "the shadow device is compiled by g++, which is not here"
    import torch  # by who asks, not by `built`: the library is loaded before torch

    if torch.version.cuda or torch.version.hip:
        return "the shadow device takes the place of CUDA's kernels: it needs a CPU build of torch"
    return None


def built() -> Path:
    """The library, from the user's cache or compiled (half a minute)."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch = Path(spec.origin).parent
    key = hashlib.sha256(SOURCE.read_bytes() + f"{version('torch')} {torch}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "preftune-shadow"
    library = cache / f"shadow-{key}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    partial = cache / f".{key}-{os.getpid()}.so"
    include, lib = torch / "include", torch / "lib"
    command = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", str(partial)]
    command += [f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]
    command += [f"-L{lib}", "-lc10", "-ltorch_cpu", "-ltorch", f"-Wl,-rpath,{lib}"]
    subprocess.run(command, check=True)
    partial.replace(library)
    return library


if __name__ == "__main__":
    print(built())
