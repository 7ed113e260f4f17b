"""The base, made once: what all that follows loads lies on the disk."""

import time
from collections.abc import Iterator
from typing import Any

from ...models.loading import resolve_base
from ..measure import Measured


def measure(options: dict[str, Any]) -> Iterator[tuple[str, Measured]]:
    """How long making the base took, and how large it is."""
    began = time.perf_counter()
    base = resolve_base(options["base"])
    size = sum(file.stat().st_size for file in base.path.glob("*.safetensors"))
    yield "made", {"seconds": time.perf_counter() - began, "bytes": size}
