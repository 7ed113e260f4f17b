"""Plain values: what is a number, and what JSON can hold. Imports nothing heavy."""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is an int or a float; True and False are neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: object) -> TypeGuard[int | float]:
    """Whether it is a number, and neither infinite nor NaN."""
    return is_number(value) and math.isfinite(value)


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same mapping for JSON: tensors and numpy scalars as numbers, what is not finite as None."""
    return {key: _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return plain(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str | None) else str(value)
