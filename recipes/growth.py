"""What a stage may say of its adapter that starts as a copy of another stage's."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import ADAPTER_CONFIG, read_regular
from ..models.altering import ALTERING, check_start
from .build import lora_values
from .problems import problem
from .schema import Recipe, Stage
from .text import Path_, Text

_NARROWING = ("exclude_modules", "layers_to_transform")
"""A child may have adapters in more places than its parent, which start at nothing."""


def start_problems(recipe: Recipe, text: Text) -> Iterator[UserError]:
    """Adapters start in a way that there is; what holds for all stages is said once."""
    said = set[Path_]()
    for name, stage in recipe.stages.items():
        if not stage.record.adapts:
            continue
        values, own = lora_values(recipe, name), stage.lora.init_lora_weights is not None
        try:
            check_start(values["init_lora_weights"], (values["r"], *values["rank_pattern"].values()))
        except UserError as error:
            path: Path_ = (*(("stages", name) if own else ()), "lora", "init_lora_weights")
            if path not in said:
                yield problem(text, path, error.problem, error.remedy)
            said.add(path)


def growth_problems(recipe: Recipe, text: Text, name: str, stage: Stage) -> Iterator[UserError]:
    """A child starts as an exact copy of its parent's adapter: its rank may grow, the rest may not change."""
    ours, theirs = lora_values(recipe, name), _parents(recipe, name, stage)
    if theirs is None:
        return
    here, parent = ("stages", name, "lora"), f"{stage.parent}, from which it starts"
    yield from _form_problems(text, here, ours, theirs, parent)
    rank, least = rank_of(ours), rank_of(theirs)
    if rank < least:
        said = f"is {ours['r']}, below {least} of {parent}"
        if least != theirs["r"]:
            said += f": init_lora_weights: {theirs['init_lora_weights']} has twice the rank"
        yield problem(text, (*here, "r"), said, f"use r: {math.ceil(least * ours['r'] / rank)} or more")
        return
    scale, wanted = _scaling(ours), _scaling(theirs)
    if not math.isclose(scale, wanted, rel_tol=1e-9):
        fitting = ours["alpha"] * wanted / scale
        said = f"is {ours['alpha']:g} and scales by {scale:g}, {parent}, by {wanted:g}"
        yield problem(text, (*here, "alpha"), said, f"use alpha: {fitting:g} with r: {ours['r']}")


def _parents(recipe: Recipe, name: str, stage: Stage) -> dict[str, Any] | None:
    """What its parent's adapter is; None where there is none, or none that its files say enough of."""
    if not stage.record.adapts:
        return None
    if stage.imports is not None:
        return _imported(stage.imports, lora_values(recipe, name))
    if stage.parent not in recipe.stages or stage.parent == name or not recipe.stages[stage.parent].record.adapts:
        return None
    return lora_values(recipe, stage.parent)


def _imported(folder: Path, ours: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same of an adapter from outside the run; which modules it adapts is seen when it is filled in."""
    try:
        config = json.loads(read_regular(folder / ADAPTER_CONFIG))
        said = {key: config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
        said |= {"r": config["r"], "alpha": config["lora_alpha"], "init_lora_weights": True}
        said |= {"trainable_token_indices": None}  # it names them by their paths, which the stage compares
        said |= {key: bool(config.get(key)) for key in ("use_rslora", "use_dora")}
        plain = config.get("peft_type") == "LORA" and not config.get("target_parameters")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # said when the stage begins
    return {**ours, **said} if plain else None


def _form_problems(
    text: Text, here: Path_, ours: Mapping[str, Any], theirs: Mapping[str, Any], parent: str
) -> Iterator[UserError]:
    """DoRA or not, patterns, and which modules."""
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "target_parameters"):
        if ours[key] != theirs[key]:
            said = f"is {_shown(ours[key])}, and {_shown(theirs[key])} in {parent}"
            yield problem(text, (*here, key), said, "say the same in both, or in the top-level lora")
    fixed = [key for key in ("rank_pattern", "alpha_pattern", "target_parameters") if theirs[key]]
    if missing := _left_out(ours["trainable_token_indices"], theirs["trainable_token_indices"]):
        said = f"leaves out {missing}, whose rows {parent}, trains"
        yield problem(text, (*here, "trainable_token_indices"), said, "name the parent's tokens too")
    for key in ("r", "alpha") if fixed else ():
        if ours[key] != theirs[key]:
            said = f"is {ours[key]:g}, and {theirs[key]:g} in {parent}, where {fixed[0]} stands beside it"
            yield problem(text, (*here, key), said, f"use {key}: {theirs[key]:g}")
    for key in _NARROWING:
        if ours[key] not in (None, theirs[key]):
            said = f"is {_shown(ours[key])}, and {_shown(theirs[key])} in {parent}"
            yield problem(text, (*here, key), said, "leave it out here, or say the same in both")
    targets, parents_ = ours["target_modules"], theirs["target_modules"]
    if targets in ("all-linear", parents_):
        return
    if isinstance(targets, str) or isinstance(parents_, str):
        missing = parents_
    else:
        missing = ", ".join(sorted(set(parents_) - set(targets)))
    if missing:
        said = f"leaves out what {parent}, adapts ({missing})"
        yield problem(text, (*here, "target_modules"), said, "keep the parent's target modules")


def _left_out(ours: object, theirs: object) -> str:
    """The tokens of a parent that its child does not name; nothing where one names them by module, which is looked at
    when the stage begins."""
    if isinstance(ours, dict) or not isinstance(theirs, list):
        return ""
    return ", ".join(map(str, sorted({*theirs} - {*(ours if isinstance(ours, list) else ())})))


def rank_of(lora: Mapping[str, Any]) -> int:
    """The rank of the adapter that is written."""
    return lora["r"] * (2 if ALTERING.fullmatch(str(lora["init_lora_weights"])) else 1)


def _scaling(lora: Mapping[str, Any]) -> float:
    return lora["alpha"] / (math.sqrt(lora["r"]) if lora["use_rslora"] else lora["r"])


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value or "not said")
