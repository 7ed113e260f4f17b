"""The stages as a graph: what each needs, in which order they run."""

import re
from collections.abc import Iterable

from ..errors import nearest
from ..eval.decoding import beam_problem
from .problems import problem
from .schema import BASE, Data, Recipe, Stage
from .text import Path_, Text

# Names that mean something else in a run folder, or in `from`.
_RESERVED = (BASE, "eval", "eval-cache")
_NAME = re.compile(r"\w[\w.-]*")


def parents(recipe: Recipe, name: str) -> list[str]:
    """The stages that this one needs: the one it starts from first, then the reward stages that score it."""
    stage = recipe.stages[name]
    needed = [] if stage.parent == BASE else [stage.parent]
    needed += [each.stage for each in stage.rewards if each.stage is not None]
    return list(dict.fromkeys(needed))


def order(recipe: Recipe) -> list[str]:
    """Every stage after the ones that it needs; as in the file where that leaves a choice.

    Raises:
        ValueError: the stages need one another in a circle; its argument is that circle.
    """
    done: list[str] = []

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in done:
            return
        if name in above:
            raise ValueError([*above[above.index(name) :], name])
        for parent in parents(recipe, name):
            visit(parent, (*above, name))
        done.append(name)

    for name in recipe.stages:
        visit(name, ())
    return done


def needed_for(recipe: Recipe, names: Iterable[str]) -> list[str]:
    """These stages and all that they need, in running order."""
    wanted: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in wanted:
            wanted.add(name)
            todo += parents(recipe, name)
    return [name for name in order(recipe) if name in wanted]


def policies(recipe: Recipe) -> list[str]:
    """The stages whose adapter speaks, each after the one that it starts from."""
    return [name for name in order(recipe) if recipe.stages[name].record.produces == "policy"]


def reward_models(recipe: Recipe) -> list[str]:
    """The stages that train a reward model."""
    return [name for name, stage in recipe.stages.items() if stage.record.produces == "reward"]


def check_graph(recipe: Recipe, text: Text) -> None:
    """Every name in the recipe means something.

    Raises:
        UserError: an unknown parent, data entry, reward stage or policy, a circle, a word said twice.
    """
    _check_data(recipe, text)
    for name, stage in recipe.stages.items():
        here: Path_ = ("stages", name)
        if name in _RESERVED or not _NAME.fullmatch(name):
            said = f"{name!r} is no name for a stage"
            raise problem(text, here, said, f"use letters, digits, dashes; not {' or '.join(_RESERVED)}")
        if stage.parent != BASE and stage.parent not in recipe.stages:
            known = [each for each in (*recipe.stages, BASE) if each != name]
            raise problem(text, (*here, "from"), f"no stage {stage.parent!r}", nearest(stage.parent, known))
        if stage.data not in recipe.data:
            raise problem(text, (*here, "data"), f"no data entry {stage.data!r}", nearest(stage.data, recipe.data))
        _check_rewards(recipe, text, name, stage)
        if stage.parent in reward_models(recipe) and stage.record.produces == "policy":
            said = f"{stage.parent!r} is a reward model, expected a policy"
            raise problem(text, (*here, "from"), said, "start from a policy, such as the reward model's own parent")
        _check_said_once(text, here, stage)
    try:
        order(recipe)
    except ValueError as error:
        circle = error.args[0]
        where: Path_ = ("stages", circle[0], "from")
        raise problem(text, where, f"a circle: {' -> '.join(circle)}", "let one of them start from base") from None
    _check_eval(recipe, text)


def fill_eval(recipe: Recipe) -> None:
    """Without `policies`, the evaluation looks at the base and every stage that is a policy."""
    if recipe.eval is not None and not recipe.eval.policies:
        recipe.eval.policies = [BASE, *policies(recipe)]


def _check_data(recipe: Recipe, text: Text) -> None:
    entries: list[tuple[Path_, Data]] = [(("data", name), entry) for name, entry in recipe.data.items()]
    if recipe.eval is not None:
        entries.append((("eval", "prompts"), recipe.eval.prompts))
    for path, entry in entries:
        if entry.path is None and not entry.sources:
            raise problem(text, path, "has neither path nor sources", "give one path, or a list of sources")
        if entry.path is not None and entry.sources:
            raise problem(text, (*path, "sources"), "stands beside path", "give one path, or a list of sources")
        if entry.sources:
            for key in ("split", "columns", "name", "revision"):
                if getattr(entry, key) is not None:
                    raise problem(text, (*path, key), "belongs to one source", "write it into that source")


def _check_rewards(recipe: Recipe, text: Text, name: str, stage: Stage) -> None:
    rewards = reward_models(recipe)
    for index, source in enumerate(stage.rewards):
        path: Path_ = ("stages", name, "reward", index)
        given = [key for key in ("stage", "model", "function") if getattr(source, key) is not None]
        if len(given) != 1:
            said = f"names {' and '.join(given) or 'nothing'}, expected one of stage, model, function"
            raise problem(text, path, said, "give each source its own entry")
        if source.stage is not None and source.stage not in rewards:
            known = recipe.stages.get(source.stage)
            said = f"no stage {source.stage!r}" if known is None else f"stage {source.stage!r} is of kind {known.kind}"
            remedy = nearest(source.stage, rewards) if rewards else "add a stage of kind reward"
            raise problem(text, path, f"{said}, expected a reward stage", remedy)
        if source.function is not None and ":" not in source.function:
            raise problem(
                text, path, f"is {source.function!r}, expected module:function", "write my_module:my_function"
            )


def _check_said_once(text: Text, here: Path_, stage: Stage) -> None:
    for key, value in stage.method().items():
        if key in stage.train:
            said = f"{key} is said twice, as {value!r} beside train and as {stage.train[key]!r} in it"
            raise problem(text, (*here, "train", key), said, "keep the one beside train")


def _check_eval(recipe: Recipe, text: Text) -> None:
    if recipe.eval is None:
        return
    part = recipe.eval
    known = [BASE, *(name for name in recipe.stages if name not in reward_models(recipe))]
    curve = part.over_optimisation is not None
    if found := beam_problem(part.beams or 1, temperature=part.temperature, kl=part.kl, over_optimisation=curve):
        raise problem(text, ("eval", "beams"), *found)
    for index, policy in enumerate(recipe.eval.policies):
        if policy not in known:
            kind = " (a reward model)" if policy in recipe.stages else ""
            said = f"{policy!r} is no policy{kind}"
            raise problem(text, ("eval", "policies", index), said, nearest(policy, known))
    if recipe.eval.reference not in (*recipe.eval.policies, BASE) and recipe.eval.policies:
        said = f"{recipe.eval.reference!r} is not among the policies"
        raise problem(text, ("eval", "reference"), said, nearest(recipe.eval.reference, recipe.eval.policies))
    for index, judge in enumerate(recipe.eval.judges):
        named = judge.get("stage")
        rewards = reward_models(recipe)
        if named is not None and named not in rewards:
            said = f"no reward stage {named!r}"
            remedy = nearest(str(named), rewards) if rewards else "add a stage of kind reward"
            raise problem(text, ("eval", "judges", index, "stage"), said, remedy)
