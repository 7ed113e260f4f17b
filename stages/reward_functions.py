"""Python functions with TRL's reward-function signature: finding one by its name, and calling it.

    function(prompts, completions, completion_ids, **columns) -> list[float | None]

As in TRL, None says that the function does not apply to that completion: it has no score there, and where several
rewards are added up it is left out of that completion's sum (TRL takes the `nansum` over the functions), so that a
completion without any score gets 0.
"""

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence

from ..data.rows import Message
from ..errors import UserError

RewardFunction = Callable[..., Sequence[float | None]]


def import_function(spec: str) -> RewardFunction:
    """The function named "module:function".

    Raises:
        UserError: no such module or function.
    """
    module, _, name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"reward {spec}", f"cannot be imported ({error})", "write module:function, importable from here"
        ) from error
    if not callable(function):
        raise UserError(f"reward {spec}", f"is a {type(function).__name__}, expected a function", "name a function")
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
    parameters = inspect.signature(function).parameters
    if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        given = {name: value for name, value in given.items() if name in parameters}
    returned = function(**given)
    if len(returned) != len(completions):
        raise UserError(
            where,
            f"the function returned {len(returned)} scores for {len(completions)} completions",
            "return one number (or None) for each completion",
        )
    return [_score(each, where, completion) for each, completion in zip(returned, completions, strict=True)]


def _score(score: float | None, where: str, completion: str | list[Message]) -> float:
    if score is None:
        return math.nan
    number = float(score)
    if not math.isfinite(number):
        said = completion if isinstance(completion, str) else completion[-1]["content"]
        raise UserError(
            where,
            f"the function returned {number} for completion {said[:80]!r}",
            "return finite numbers, or None where it has no score",
        )
    return number
