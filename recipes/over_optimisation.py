"""The recipe's `eval.over_optimisation`: what it leaves out is filled in, what it says is checked."""

from ..errors import UserError, nearest
from ..eval.judges.names import judge_name, only_compares, scoring_judges
from .problems import dotted, problem
from .schema import Eval, OverOptimisation, Recipe
from .text import Text


def settle_over_optimisation(recipe: Recipe, text: Text | None = None) -> None:
    """Fills in `policy` and `proxy`, in place; nothing where the recipe has no such section.

    Args:
        text: the recipe's file, for messages with its lines.

    Raises:
        UserError: no PPO stage, no proxy that follows from it, an unknown judge, one that only compares, one twice,
            greedy decoding.
    """
    part = recipe.eval
    if part is None or part.over_optimisation is None:
        return
    wanted = part.over_optimisation
    if part.temperature == 0:
        # said here as well as in the evaluation, so that no stage trains in vain
        said = "greedy decoding (eval.temperature 0) has no KL and one reply a prompt"
        raise _problem(text, None, said, "set eval.temperature above 0, or leave the section out")
    stages = [name for name, stage in recipe.stages.items() if stage.record.on_policy and stage.record.needs_reward]
    if wanted.policy is None:
        if not stages:
            raise _problem(text, "policy", "the recipe has no PPO stage", "add one, or leave the section out")
        wanted.policy = stages[0]
    elif wanted.policy not in stages:
        said = f"no PPO stage {wanted.policy!r}"
        raise _problem(text, "policy", said, nearest(wanted.policy, stages) if stages else "leave the section out")
    if wanted.proxy is None:
        wanted.proxy = _proxy(recipe, part, wanted)
        if wanted.proxy is None:
            said = f"not given, and no judge reads the reward stage that {wanted.policy} trains on"
            raise _problem(text, "proxy", said, "name a judge of eval.judges")
    for key in ("gold", "proxy"):
        _check_judge(part, key, getattr(wanted, key), text)
    if wanted.gold == wanted.proxy:
        said = f"{wanted.gold!r} is the proxy as well"
        raise _problem(text, "gold", said, "name a judge that the policy is not trained on")


def _proxy(recipe: Recipe, part: Eval, wanted: OverOptimisation) -> str | None:
    """The judge of the (first) reward stage that the policy trains on, where one reads it."""
    rewards = [each.stage for each in recipe.stages[str(wanted.policy)].rewards if each.stage is not None]
    found = [judge for name in rewards for judge in part.judges if judge.get("stage") == name]
    return judge_name(found[0]) if found else None


def _check_judge(part: Eval, key: str, name: str, text: Text | None) -> None:
    named = next((judge for judge in part.judges if judge_name(judge) == name), None)
    scoring = scoring_judges(part.judges)
    if named is None:
        remedy = nearest(name, scoring) if scoring else "add it to eval.judges"
        raise _problem(text, key, f"no judge {name!r} in eval.judges", remedy)
    if only_compares(named):
        said = f"{name!r} compares two replies and has no score for one"
        raise _problem(text, key, said, f"use one of {', '.join(scoring)}" if scoring else "add a judge that scores")


def _problem(text: Text | None, key: str | None, said: str, remedy: str) -> UserError:
    """At one key of the section, or at the section itself."""
    path = ("eval", "over_optimisation", *(() if key is None else (key,)))
    return UserError(dotted(path), said, remedy) if text is None else problem(text, path, said, remedy)
