"""The process' free memory, where the C library keeps it."""

import ctypes
import sys


def give_back() -> None:
    """Let the system have what is free. glibc keeps it, in pieces: what one phase of a program leaves (loading, a
    training step, a rollout) the next one would grow on top of. Elsewhere than on Linux nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
