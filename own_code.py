"""The Python that a recipe names (reward and judge functions, methods), found without `sys.path`.

A folder on `sys.path` is everybody's: a file in it that is called like an optional package (`triton.py`, `wandb/`) is
imported by each library that looks whether that package is installed. So the recipe's folder and the working folder
are not put there. A module in them is found for whoever names it here, and for what was found there: the code that a
recipe names may import what lies beside it, and nobody else does. What is installed goes first.
"""

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import FrameType, ModuleType

FOLDERS_VARIABLE = "PREFTUNE_CODE_FOLDERS"
"""In the environment of the processes that we start: where they look besides."""

_SAFE_PATH, _OURS = "PYTHONSAFEPATH", "PREFTUNE_SAFE_PATH"
FILE_MODULE = "preftune_kind_"
"""How the module of a method's file is called: this, and a name of its own."""

# Packages that the libraries below us use where they find them: a module of that name would be theirs too.
_LIBRARIES = frozenset((
    "apex", "bitsandbytes", "clearml", "codecarbon", "comet_ml", "cuda", "cupy", "deepspeed", "dvclive",
    "flash_attn", "flash_attn_3", "flax", "galore_torch", "jax", "kernels", "liger_kernel", "llm_blender",
    "megatron", "mlflow", "mpi4py", "msamp", "neptune", "nvidia", "onnx", "optimum", "pandas", "peft", "polars",
    "psutil", "pynvml", "ray", "schedulefree", "sentencepiece", "sklearn", "swanlab", "tensorboard",
    "tensorboardX", "tensorflow", "tiktoken", "torchao", "torchaudio", "torchvision", "trackio",
    "transformer_engine", "triton", "triton_kernels", "unsloth", "vllm", "wandb", "weave", "xformers",
))  # fmt: skip


_MACHINERY = ("importlib", "_frozen_importlib", "_frozen_importlib_external")


class _Finder(MetaPathFinder):
    """Last among Python's finders.

    Attributes:
        folders: in which it looks, in that order. own: the top-level names that it has found there.
        asked: the name that we are looking for ourselves.
    """

    def __init__(self) -> None:
        self.folders: list[str] = []
        self.own: set[str] = set()
        self.asked: str | None = None

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        del target
        if path is not None or fullname in _LIBRARIES:  # what is in a package of theirs is found by its own folder
            return None
        if fullname != self.asked and not self._is_own(_importer(inspect.currentframe())):
            return None
        spec = PathFinder.find_spec(fullname, self.folders)
        if spec is not None:
            self.own.add(fullname)
        return spec

    def _is_own(self, module: str) -> bool:
        return module.partition(".")[0] in self.own or module.startswith(FILE_MODULE)


_FINDER = _Finder()


def _importer(frame: FrameType | None) -> str:
    """The name of the module whose code asks for an import."""
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name != __name__ and name.partition(".")[0] not in _MACHINERY:
            return name
        frame = frame.f_back
    return ""


def look_in(folders: Iterable[Path]) -> None:
    """Find what a recipe names in these folders too, after those of earlier calls."""
    handed = filter(None, os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep))
    for folder in (*(str(each.resolve()) for each in folders), *handed):
        if folder not in _FINDER.folders:
            _FINDER.folders.append(folder)
    if os.environ.pop(_OURS, None):
        # what the code starts itself is for it to say
        os.environ.pop(_SAFE_PATH, None)
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)


@contextmanager
def forgotten() -> Generator[None]:
    """What is found within it is forgotten at its end, the modules too: what another recipe calls by the same name is
    looked for anew."""
    folders, own, before = list(_FINDER.folders), set(_FINDER.own), set(sys.modules)
    try:
        yield
    finally:
        found = _FINDER.own - own
        _FINDER.folders, _FINDER.own = folders, own
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in found or name.startswith(FILE_MODULE):
                del sys.modules[name]


def environment() -> dict[str, str]:
    """What a process that we start has in its environment, to find the same code and to import nothing besides it."""
    folders = {FOLDERS_VARIABLE: os.pathsep.join(_FINDER.folders)}
    return folders if _SAFE_PATH in os.environ else {**folders, _SAFE_PATH: "1", _OURS: "1"}


def import_named(module: str) -> ModuleType:
    """The module of that name, installed or in one of the folders; raises as `importlib.import_module` does."""
    with _asking(module):
        return importlib.import_module(module)


def find_named(module: str) -> ModuleSpec | None:
    """Where that module is, without running it (the packages above it are run); as `importlib.util.find_spec`."""
    with _asking(module):
        return importlib.util.find_spec(module)


@contextmanager
def _asking(module: str) -> Generator[None]:
    root = module.partition(".")[0]
    if root in _LIBRARIES and root not in sys.modules and importlib.util.find_spec(root) is None:
        said = f"{root} is the name of a library that others import where they find it: call your module something else"
        raise ImportError(said)
    before, _FINDER.asked = _FINDER.asked, root
    try:
        yield
    finally:
        _FINDER.asked = before
