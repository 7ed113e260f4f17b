"""bitsandbytes without a kernel from the hub.

Where the package `kernels` is installed, on a CPU that multiplies in bfloat16, importing bitsandbytes (which PEFT does
whenever it is there) fetches a kernel from the hub and runs it; without that package it says so each time. Nothing that
comes with a model or a library's import runs here, and our own product needs none (`quantised.py`).
"""

import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_ASKS, _ASKED = "bitsandbytes.backends.cpu.ops", "kernels"


class _Alone(Loader):
    """Runs a module as another loader does, which finds no `kernels` meanwhile."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        loaded: dict[str, Any] = sys.modules
        nothing = object()
        before = loaded.get(_ASKED, nothing)
        loaded[_ASKED] = None  # an import of it fails
        logging.getLogger(_ASKS).setLevel(logging.ERROR)
        try:
            self._loader.exec_module(module)
        finally:
            if before is nothing:
                del loaded[_ASKED]
            else:
                loaded[_ASKED] = before


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _ASKS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Alone(spec.loader)
        return spec


def leave_out() -> None:
    """Have it so from here on. Calling it twice changes nothing."""
    if not any(isinstance(each, _Finder) for each in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
