"""Which texts have been seen, in 8 bytes each: the texts of a million rows would take hundreds of megabytes."""

import hashlib
from array import array
from bisect import bisect_left

import numpy as np

_RECENT = 1 << 16


def number_of(text: str) -> int:
    """64 bits of a hash of the text: among a million texts two share theirs once in 37 million data sets."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class Seen:
    """A growing set of such numbers: 8 bytes each, sorted, and the latest in a plain set until it is merged in."""

    def __init__(self) -> None:
        self._sorted, self._recent = array("Q"), set[int]()

    def add(self, number: int) -> bool:
        """Whether the number was there already; it is afterwards."""
        if number in self._recent:
            return True
        place = bisect_left(self._sorted, number)
        if place < len(self._sorted) and self._sorted[place] == number:
            return True
        self._recent.add(number)
        if len(self._recent) >= max(_RECENT, len(self._sorted) // 8):
            self._merge()
        return False

    def _merge(self) -> None:
        recent = np.fromiter(self._recent, np.uint64, len(self._recent))
        merged = np.concatenate([np.frombuffer(self._sorted, np.uint64), recent])
        merged.sort(kind="stable")
        self._sorted = array("Q", merged.tobytes())
        self._recent.clear()
