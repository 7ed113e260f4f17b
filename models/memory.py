"""The memory of this process and of its accelerator."""

import ctypes
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch


def release_free_memory() -> None:
    """Hand memory that is free back to the system.

    glibc keeps it in pieces, so that what one phase leaves (loading, a training step, a rollout) the next one grows on
    top of. Elsewhere than on Linux this does nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


COMPILED_PRODUCTS, COMPILED_BYTES = 1024, 600_000
"""How many products oneDNN keeps compiled, one of each shape, and what it holds of each: 560 to 620 kB were measured of
those of a training step in bf16. Those of a batch's attention have shapes that hardly another batch has."""


class Holes:
    """Keeps down what a CPU's allocator holds for nothing in a long row of steps.

    Batches of ever other sizes leave holes of ever other sizes, and a process that needs no more than at first grows by
    a percent a step, to half as much again. Handing everything back costs the next step a tenth of its time, so it is
    done when the process has grown by `GROWTH` since the step after the last time.
    """

    GROWTH = 0.1

    def __init__(self) -> None:
        self._before: int | None = None

    def look(self) -> None:
        """Called after each forward and backward."""
        held = resident_bytes()
        if self._before is None:
            self._before = held
        elif held > self._before * (1 + self.GROWTH):
            release_free_memory()
            self._before = None


def resident_bytes() -> int:
    """What this process has in memory now."""
    import psutil

    return psutil.Process().memory_info().rss


def reset_peak_memory() -> None:
    """Forget the peak so far, the accelerator's or, without one, this process'. Only Linux lets go of the latter."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        (_PROCESS / "clear_refs").write_text(_FORGET_PEAK)


def peak_memory_bytes() -> int | None:
    """The peak since `reset_peak_memory`: of the accelerator's tensors; without one, of what the process has resident.

    None where the system does not count it.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError, StopIteration):
        # the kernel's own count for this process: getrusage also knows what was before the program was started
        said = (_PROCESS / "status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in said if line.startswith("VmHWM:")).split()[1]) * 1024
    if find_spec("resource") is not None:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    import psutil

    return getattr(psutil.Process().memory_info(), "peak_wset", None)


_PROCESS = Path("/proc/self")
_FORGET_PEAK = "5"
"""proc(5): written to clear_refs, it sets the peak resident size to the current one, and clears nothing."""
