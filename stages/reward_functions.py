"""Python functions with TRL's reward-function signature: finding one by its name, and calling it.

    function(prompts, completions, completion_ids, **columns) -> list[float | None]

It may be `async`, and may return an array, a tensor or a generator.

As in TRL, None says that the function does not apply to that completion: it has no score there, and where several
rewards are added up it is left out of that completion's sum (TRL takes the `nansum` over the functions), so that a
completion without any score gets 0.
"""

import asyncio
import inspect
import math
import numbers
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..data.rows import Message
from ..errors import UserError, user_code
from ..own_code import import_named

_LARGEST = 3.4e38
"""Scores are fp32."""

_ALWAYS = ("prompts", "completions", "completion_ids")
"""What a function is given beside the data's columns."""

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
        function = getattr(import_named(module), name)
    if not callable(function):
        raise UserError(place, f"{spec} is a {type(function).__name__}, expected a function", "name a function")
    return function  # pyright: ignore[reportReturnType]: what it returns is checked at each call


def check_signature(function: RewardFunction, where: str, columns: Collection[str] | None = None) -> None:
    """Whether the function can be called as a reward, found without calling it.

    Args:
        columns: of the data; None where they are not known: any name may be one.

    Raises:
        UserError: it does not look at what is to be scored, or needs what nothing fills.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some built-in callables do not say
        return
    named = set(parameters)
    given = dict.fromkeys(columns if columns is not None else named)
    _taken(function, {**given, **dict.fromkeys(_ALWAYS)}, where)
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    if not takes_all and not named & {"completions", "completion_ids"}:
        said = f"it takes {', '.join(named) or 'nothing'}, and no completions to score"
        raise UserError(where, said, "write def NAME(prompts, completions, **columns)")


def call_reward_function(
    function: RewardFunction,
    *,
    where: str,
    prompts: Sequence[object],
    completions: Sequence[str | list[Message]],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[object]],
    failed: dict[int, str] | None = None,
) -> list[float]:
    """One score a completion, in order; NaN where the function returned None.

    The function gets those of the arguments that it has parameters for, all of them where it takes `**kwargs`.

    Args:
        where: its place in the recipe, for errors.
        prompts, completions: as the data had them, text or conversations; a completion in its prompt's own form.
        completion_ids: token ids of the completions.
        columns: every other column of the data, a list with an element for each completion.
        failed: gets the place of each completion whose score is neither None nor a finite number, and what is wrong
            with it; None: that is an error.

    Raises:
        UserError: a parameter that nothing fills; not a list, array, tensor or generator of scores, not as many as
            completions, or one that is neither None nor a finite number.
    """
    given = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    name = getattr(function, "__name__", type(function).__name__)
    given = _taken(function, given, where)
    with user_code(where, f"{name} raised", "correct the function"):
        returned = _called(function, given)
        scores = _listed(returned)
    if scores is None:
        said = "None" if returned is None else f"a {type(returned).__name__}"
        raise UserError(
            where,
            f"{name} returned {said}, expected a list of {len(completions)} scores",
            "it is called once with all completions: return one number (or None) for each",
        )
    if len(scores) != len(completions):
        raise UserError(
            where,
            f"{name} returned {len(scores)} scores for {len(completions)} completions",
            "return one number (or None) for each completion",
        )
    found = [_score(each) for each in scores]
    for place, (each, completion) in enumerate(zip(found, completions, strict=True)):
        if each is None:
            said = f"{name} returned {_shown(scores[place])}"
            if failed is None:
                text = completion if isinstance(completion, str) else completion[-1]["content"]
                remedy = "return finite numbers, or None where it has no score"
                raise UserError(where, f"{said} for completion {text[:80]!r}", remedy)
            failed[place] = said
    return [math.nan if each is None else each for each in found]


def _taken(function: RewardFunction, given: dict[str, Any], where: str) -> dict[str, Any]:
    """Those of the arguments that the function has parameters for; every one that it needs is among them."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in callables do not say
        return given
    if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
        given = {name: value for name, value in given.items() if name in {each.name for each in parameters}}
    unnamed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for each in parameters:
        if each.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise UserError(where, f"its parameter {each.name!r} has no name to be called by", "take away the `/`")
        if each.kind not in unnamed and each.default is inspect.Parameter.empty and each.name not in given:
            raise UserError(
                where,
                f"it needs {each.name!r}, which is no column of the data",
                "name a column, prompts, completions or completion_ids; or give the parameter a default",
            )
    return given


def _called(function: RewardFunction, given: dict[str, Any]) -> Any:
    """What the function returns; one that is `async` is run to its end, as in TRL, in a loop of its own thread (a
    notebook's thread has one running already)."""
    returned: Any = function(**given)
    if not inspect.iscoroutine(returned):
        return returned
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, returned).result()


def _listed(returned: Any) -> list[Any] | None:
    """The scores as a list; None where that is nothing with one element a completion."""
    if hasattr(returned, "tolist"):  # a tensor, an array, a series
        returned = returned.tolist()
    if isinstance(returned, Sequence | Generator) and not isinstance(returned, str | bytes):
        return list(returned)
    return None


def _score(score: Any) -> float | None:
    """NaN where the function has none; None where it is no finite number."""
    if score is None:
        return math.nan
    if hasattr(score, "item") and getattr(score, "size", None) is not None and _elements(score) == 1:
        score = score.item()
    if not isinstance(score, numbers.Real) or not abs(float(score)) <= _LARGEST:
        return None
    return float(score)


def _shown(score: Any) -> str:
    if hasattr(score, "item") and getattr(score, "size", None) is not None and _elements(score) == 1:
        score = score.item()
    return repr(score) if len(repr(score)) <= 40 else f"a {type(score).__name__}"


def _elements(score: Any) -> int:
    """How many numbers a tensor or an array holds."""
    return int(score.numel()) if hasattr(score, "numel") else int(score.size)
