"""Python functions with TRL's reward-function signature: finding one by its name, and calling it.

    function(prompts, completions, completion_ids, **columns) -> list[float | None]

As in TRL, None says that the function does not apply to that completion: it has no score there, and where several
rewards are added up it is left out of that completion's sum (TRL takes the `nansum` over the functions), so that a
completion without any score gets 0.
"""

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..data.rows import Message
from ..errors import UserError, user_code

_LARGEST = 3.4e38
"""Scores are fp32."""

RewardFunction = Callable[..., Any]


def import_function(spec: str, where: str | None = None) -> RewardFunction:
    """The function named "module:function".

    Args:
        where: its place in the recipe, for errors.

    Raises:
        UserError: no such module or function, or a module that raises.
    """
    place = where or f"reward {spec}"
    module, _, name = spec.partition(":")
    with user_code(place, f"{spec} cannot be imported", "write module:function, importable from here"):
        function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise UserError(place, f"{spec} is a {type(function).__name__}, expected a function", "name a function")
    return function  # pyright: ignore[reportReturnType]: what it returns is checked at each call


def call_reward_function(
    function: RewardFunction,
    *,
    where: str,
    prompts: Sequence[object],
    completions: Sequence[str | list[Message]],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[object]],
) -> list[float]:
    """One score a completion, in order; NaN where the function returned None.

    The function gets those of the arguments that it has parameters for, all of them where it takes `**kwargs`.

    Args:
        where: its place in the recipe, for errors.
        prompts, completions: as the data had them, text or conversations; a completion in its prompt's own form.
        completion_ids: token ids of the completions.
        columns: every other column of the data, a list with an element for each completion.

    Raises:
        UserError: not as many scores as completions, or one that is neither None nor a finite number.
    """
    given = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    name = getattr(function, "__name__", "the function")
    try:
        parameters = inspect.signature(function).parameters
    except ValueError as error:  # some that are written in C
        raise UserError(where, f"{name} does not say what it takes", "wrap it in a function of your own") from error
    if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        given = {name: value for name, value in given.items() if name in parameters}
    with user_code(where, f"{name} raised", "correct the function"):
        answer: Any = function(**given)
        # a generator, a tuple or an array will do
        returned = list(answer) if isinstance(answer, Iterable) and not isinstance(answer, str | Mapping) else None
    if returned is None:
        said = f"the function returned {type(answer).__name__} {str(answer)[:40]!r}, expected a list of numbers"
        raise UserError(where, said, "return one number (or None) for each completion")
    if len(returned) != len(completions):
        raise UserError(
            where,
            f"the function returned {len(returned)} scores for {len(completions)} completions",
            "return one number (or None) for each completion",
        )
    return [_score(each, where, completion) for each, completion in zip(returned, completions, strict=True)]


def _score(score: object, where: str, completion: str | list[Message]) -> float:
    if score is None:
        return math.nan
    try:
        # also a tensor or an array of one number
        number = math.inf if isinstance(score, str | bytes) else float(score)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, RuntimeError):
        number = math.inf
    if not math.isfinite(number) or abs(number) > _LARGEST:
        said = completion if isinstance(completion, str) else completion[-1]["content"]
        shown = str(score) if isinstance(score, float) else repr(score)
        raise UserError(
            where,
            f"the function returned {shown[:40]} for completion {said[:80]!r}",
            "return finite numbers, or None where it has no score",
        )
    return number
