"""What of a recipe's servers of replies could not be, said before anything trains; no server is asked for anything."""

from collections.abc import Iterator
from typing import Any

from ..errors import UserError
from ..eval.decoding import server_problem
from ..stages.serving.kinds import check_kind
from ..stages.serving.place import place_of
from .problems import problem
from .schema import BASE, Recipe
from .text import Path_, Text


def served_problems(recipe: Recipe, text: Text) -> Iterator[UserError]:
    """Of the evaluation's server, and of those of stages that sample with a policy that is finished."""
    part, bits = recipe.eval, recipe.model.quantization
    if part is not None and part.rollout is not None:
        here = ("eval", "rollout")
        yield from _place_problems(part.rollout.settings(), here)
        if found := server_problem(part.beams or 1, bits):
            yield problem(text, here, *found)
        for name in part.policies:
            yield from _kind_problems(recipe, text, name, here)
    for name, stage in recipe.stages.items():
        if stage.record.trains or stage.method().get("rollout_engine") is None:
            continue
        here = ("stages", name, "rollout")
        yield from _place_problems(stage.method(), here)
        if found := server_problem(1, bits):
            yield problem(text, here, *found)
        if stage.imports is None:
            yield from _kind_problems(recipe, text, stage.parent, here)


def _place_problems(settings: Any, here: Path_) -> Iterator[UserError]:
    try:
        place_of(settings, ".".join(map(str, here)), key_needed=False)
    except UserError as error:
        yield error


def _kind_problems(recipe: Recipe, text: Text, policy: str, here: Path_) -> Iterator[UserError]:
    """A policy whose adapter servers do not take; one of an unknown name is said elsewhere."""
    stage = recipe.stages.get(policy)
    if policy == BASE or stage is None:
        return
    values = recipe.lora.model_dump() | stage.lora.model_dump(exclude_none=True)
    doubled = str(values.pop("init_lora_weights")).startswith(("pissa", "olora"))
    values["r"] *= 2 if doubled else 1
    try:
        check_kind(values, f"the policy {policy}")
    except UserError as error:
        yield problem(text, here, f"{error.where}: {error.problem}", error.remedy)
