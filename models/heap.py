"""The old name of `memory.release_free_memory`."""

from .memory import release_free_memory as give_back

__all__ = ["give_back"]
