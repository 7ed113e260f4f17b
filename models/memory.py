"""The memory of this process and of its accelerator."""

import ctypes
import sys
from importlib.util import find_spec

import torch


def release_free_memory() -> None:
    """Hand memory that is free back to the system.

    glibc keeps it in pieces, so that what one phase leaves (loading, a training step, a rollout) the next one grows on
    top of. Elsewhere than on Linux this does nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    """What this process has in memory now."""
    import psutil

    return psutil.Process().memory_info().rss


def reset_peak_memory() -> None:
    """Forget the accelerator's peak so far. A process' own peak cannot be reset."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes() -> int | None:
    """The accelerator's peak since `reset_peak_memory`; without one, the process' peak resident size so far.

    None where the system does not count it.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if find_spec("resource") is not None:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    import psutil

    return getattr(psutil.Process().memory_info(), "peak_wset", None)
