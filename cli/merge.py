"""`preftune merge`: a stage's adapter merged into its base."""

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..files import RECIPE, is_running
from ..intact import check_intact
from ..printed import printable
from .folder import holds_adapter, no_adapter

if TYPE_CHECKING:
    from ..models.merging import Merged, Rows

_DTYPES = ("float32", "bfloat16", "float16")
_ROWS, _TOKENS = 32, 2048
"""On so much of the stage's own data the cost is measured."""
_MARK = ".preftune-merging"
"""In the folder that a merge writes: until it is whole nobody else's files lie there."""
_COSTLY = 0.01
"""Nats a token from which float32 is advised."""


def merge_stage(adapter: Path, out: Path, dtype: str | None = None) -> None:
    """Write the base with the adapter merged into it; print where, and what the merge costs.

    Args:
        adapter: a finished stage's folder.
        out: a folder that does not exist yet or is empty.
        dtype: one of `_DTYPES`; None: the one that the stage was trained in.

    What is written appears whole or not at all: it is written beside `out`, in `.NAME.merging`, and moved there.

    Raises:
        UserError: there is no adapter, it is damaged, its base has changed, or `out` is not empty.
    """
    if not holds_adapter(adapter):
        raise no_adapter(adapter, "give a finished stage's folder, such as runs/NAME/dpo")
    check_new(out)
    if dtype is not None and dtype not in _DTYPES:
        raise UserError("--dtype", f"{dtype!r} is unknown", f"use one of {', '.join(_DTYPES)}")
    check_intact(adapter)
    from ..models.merging import merge_adapter

    with beside(out) as partial:
        merged = merge_adapter(adapter, partial, dtype, stage_rows(adapter))
    said = f"{out}: {merged.base.spec} with {adapter} merged into it, {merged.dtype}"
    print(printable(said + unpacked_in_words(merged)))
    print(cost_in_words(merged))


def check_new(out: Path) -> None:
    """Raises UserError unless there is no such folder yet, or an empty one."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(str(out), "exists and is not empty", "give a new folder")


@contextmanager
def beside(out: Path) -> Generator[Path]:
    """An empty folder beside `out`, which takes its place when the block ends well; what a kill left of one goes.

    Args:
        out: a folder that does not exist yet or is empty (`check_new`).

    Raises:
        UserError: it cannot be made.
    """
    try:
        out = out.resolve()
        partial = out.with_name(f".{out.name}.merging")
        if partial.exists():
            _check_left(partial, out)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / _MARK).write_text(str(os.getpid()), encoding="utf-8")
    except (OSError, RuntimeError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise UserError(str(out), f"cannot be written ({said})", "give another folder") from error
    try:
        yield partial
        partial.rename(out)
        (out / _MARK).unlink()
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_left(partial: Path, out: Path) -> None:
    """Raises UserError unless what stands there is a merge's that was killed."""
    mark = partial / _MARK
    if not mark.is_file() and (not partial.is_dir() or any(partial.iterdir())):
        raise UserError(str(partial), "exists, and no merge made it", "move it away, or give another folder")
    owner = mark.read_text(encoding="utf-8").strip() if mark.is_file() else ""
    if owner.isdecimal() and is_running(int(owner)):
        raise UserError(str(out), f"another merge (process {owner}) writes it", "wait for it, or give another folder")


def unpacked_in_words(merged: "Merged") -> str:
    """What was done with a base that the stage had quantised; nothing for another one."""
    return "" if merged.unpacked is None else f"; the base's weights are those of its {merged.unpacked} copy, unpacked"


def cost_in_words(merged: "Merged") -> str:
    """One line: the numbers, and what to do where they differ."""
    cost, dtype = merged.cost, merged.dtype
    if cost is None:
        return "not measured: there is no run with the stage's data beside the adapter; in fp32 both say the same"
    if merged.reward:
        said = f"mean score {cost.exact:.4f} in float32 with the adapter beside, {cost.merged:.4f} merged in {dtype}"
        return f"{cost.tokens} rows of its own data: {said}; {cost.difference:.2g} apart a row"
    numbers = [f"{cost.exact:.4f} nats a token in float32 with the adapter beside"]
    numbers += [] if cost.beside is None else [f"{cost.beside:.4f} in training's dtype"]
    said = f"{cost.tokens} tokens of its own data: {', '.join(numbers)}, {cost.merged:.4f} merged in {dtype}"
    lost = cost.merged - cost.exact
    advised = dtype != "float32" and lost > _COSTLY
    return f"{said}: the merge costs {lost:.3f} nats a token; --dtype float32 keeps them" if advised else said


def stage_rows(adapter: Path) -> "Rows":
    """Some rows of the stage's own data, or of the nearest stage above whose data have replies; none where the run's
    recipe or its data are not at hand."""
    run, name = adapter.resolve().parent, adapter.resolve().name
    if not (run / RECIPE).is_file():
        return ()
    from ..data.encode import encode_rows
    from ..data.load import load_rows
    from ..models.auto import open_tokenizer
    from ..recipes.build import data_folders, data_spec
    from .policies import run_recipe

    try:
        recipe = run_recipe(run)
        while recipe.stages[name].record.rows == "prompt":
            name = recipe.stages[name].parent
        stage = recipe.stages[name]
        spec = data_spec(recipe.data[stage.data], recipe.seed)
        rows = list(load_rows(spec, stage.record.rows, data_folders(recipe, stage.data, run)).rows)[:_ROWS]
        tokenizer = open_tokenizer(adapter, str(adapter))
        encoded = encode_rows(stage.record.rows, rows, tokenizer, spec)[0]
    except (UserError, KeyError, OSError):
        return ()
    return _labelled(encoded)


def _labelled(encoded: object) -> "Rows":
    """Encoded rows of any kind as ids and labels, up to so many tokens; a pair counts by its chosen reply."""
    from ..data.encode import IGNORED

    found: list[tuple[list[int], list[int]]] = []
    for row in encoded:  # pyright: ignore[reportGeneralTypeIssues]: a Dataset, which is not typed as iterable
        reply = row.get("chosen_ids") or (row.get("completion_ids") if row.get("label", True) else None)
        if "input_ids" in row:
            found.append((row["input_ids"], row["labels"]))
        elif reply:
            found.append(([*row["prompt_ids"], *reply], [IGNORED] * len(row["prompt_ids"]) + list(reply)))
        if sum(len(ids) for ids, _ in found) > _TOKENS:
            break
    return found
