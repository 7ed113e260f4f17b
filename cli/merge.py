"""`preftune merge`: a stage's adapter merged into its base."""

from pathlib import Path

from ..errors import UserError
from .folder import holds_adapter

_DTYPES = ("float32", "bfloat16", "float16")


def merge_stage(adapter: Path, out: Path, dtype: str | None = None) -> None:
    """Write the base with the adapter merged into it, and print where.

    Args:
        adapter: a finished stage's folder.
        out: a folder that does not exist yet or is empty.
        dtype: one of `_DTYPES`; None: the one that the stage was trained in.

    Raises:
        UserError: there is no adapter, its base has changed, or `out` is not empty.
    """
    if not holds_adapter(adapter):
        raise UserError(str(adapter), "holds no adapter", "give a finished stage's folder, such as runs/NAME/dpo")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(str(out), "exists and is not empty", "give a new folder")
    if dtype is not None and dtype not in _DTYPES:
        raise UserError("--dtype", f"{dtype!r} is unknown", f"use one of {', '.join(_DTYPES)}")
    from ..models.merging import merge_adapter

    merged = merge_adapter(adapter, out, dtype)
    print(f"{out}: {merged.base.spec} with {adapter} merged into it, {merged.dtype}")
