"""What the card gives when nothing is in the way: a bf16 product and a copy, by which everything else is judged."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from ..measure import Measured, product_rate


def measure(options: dict[str, Any]) -> Iterator[tuple[str, Measured]]:
    """The rate of a large product, in 10^12 operations a second, and of a copy, in 10^9 bytes read and written."""
    yield "matrix product", {"tflops": product_rate(size=16 if options["tiny"] else 2048) / 1e12}
    yield "copy", {"gigabytes_per_second": _copied(1 << (12 if options["tiny"] else 30)) / 1e9}


def _copied(size: int) -> float:
    """Bytes a second, each counted twice: it is read and written."""
    # numbers, not zeros: a card may be faster with those
    one = torch.empty(size // 2, dtype=torch.bfloat16, device="cuda").normal_()
    other = torch.empty_like(one)

    def timed(times: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            other.copy_(one)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    timed(3)
    return 20 * 2 * size / timed(20)
