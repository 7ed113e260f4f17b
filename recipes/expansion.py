"""Experiments: `seeds` and `grid` of a recipe, written out as a stage for each value.

A stage has a point for each combination of what varies: seeds, which are one axis of the whole recipe, and each key of
a grid. What comes from it, or reads the rows that it samples, varies as it does: each point of a parent gets its own
child, and where a stage has several parents those of one point belong together. A child whose parent has seeds has the
same, and trains with them.
"""

import copy
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import UserError, gathering
from .problems import problem, shown
from .text import Path_, Text

MOST = 64
"""Stages that a recipe may be written out to."""

SEED = ""
"""The axis that all stages share; any other is (stage, key)."""

Axis = tuple[str, str]
Point = dict[Axis, Any]
_SEED: Axis = (SEED, "seed")
_FIXED = ("kind", "from", "reward", "teacher", "seed", "seeds", "grid", "train", "lora")


def expand(text: Text) -> list[UserError]:
    """Write out the stages of the file's values, and where they are named; their kinds and parents stand there already.

    What was written out is stated in the values as `expanded: {name: [stages]}`.

    Returns:
        What is wrong with seeds and grids; the values are then as they were.
    """
    values, found = text.values, list[UserError]()
    stages = values.get("stages")
    if not isinstance(stages, dict) or not all(isinstance(each, dict) for each in stages.values()):
        return found
    if not _asked(values, stages):
        return found
    shared = values.get("seeds")
    points: dict[str, list[Point]] = {}
    above = {name: _parents(values, name) for name in stages}
    with gathering(found):
        if shared is not None:
            _check_values(text, ("seeds",), shared, seeds=True)
        for name in _in_order(above):
            points[name] = _points(text, stages, name, above[name], points, shared)
        total = sum(map(len, points.values()))
        if total > MOST:
            said = f"seeds and grids make {total} stages of {len(stages)}, expected at most {MOST}"
            raise problem(text, ("stages",), said, "vary less at once, in several recipes")
    if found:
        return found
    made: dict[str, Any] = {}
    groups: dict[str, list[str]] = {}
    for name, stage in stages.items():
        for point in points[name]:
            new = variant(name, point)
            if new in made or (new in stages and new != name):
                said = f"{new!r} would be the name of two stages"
                found.append(problem(text, ("stages", name), said, "rename one, or leave out one of two like values"))
                continue
            made[new] = _stage(stage, name, point, points, _sampled(values, stage))
            groups.setdefault(name, []).append(new)
            _place(text, name, new)
    if found:
        return found
    values["stages"] = made
    _expand_data(text, points)
    values.pop("seeds", None)
    written = {name: names for name, names in groups.items() if names != [name]}
    if written:
        values["expanded"] = written
    return found


def name_all(text: Text) -> list[UserError]:
    """Put all variants where the evaluation names a stage of `expanded`."""
    expanded = text.values.get("expanded")
    if not isinstance(expanded, dict) or not all(isinstance(each, list) for each in expanded.values()):
        return []
    return list(_name_all(text, expanded))


def variant(name: str, point: Mapping[Axis, Any]) -> str:
    """The name of a stage at a point, such as `dpo-beta0_03-seed1`; no dot, which overrides have for their own."""
    parts = []
    for (origin, key), value in point.items():
        last = key.rpartition(".")[2]
        label = last if origin in (name, SEED) else f"{origin}_{last}"
        said = value if isinstance(value, str) else json.dumps(value)
        parts.append(f"{label}{re.sub(r'[^0-9A-Za-z_-]', '_', said)}")
    return "-".join([name, *parts])


def in_words_once(found: Sequence[UserError], expanded: object) -> list[UserError]:
    """The same problems, one that all variants of a stage have as one of that stage."""
    names = {new: name for name, each in expanded.items() for new in each} if isinstance(expanded, dict) else {}
    said: dict[tuple[str, ...], UserError] = {}
    for error in found:
        words = [error.where, error.problem, error.remedy]
        # about a variant's own key, not about the variants
        new = next((each for each in names if re.search(rf"\.{re.escape(each)}(\.|$)", error.where)), None)
        if new is not None:
            words = [each.replace(new, names[new]) for each in words]
        said.setdefault(tuple(words), error if new is None or type(error) is not UserError else UserError(*words))
    return list(said.values())


def expansion_words(expanded: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for each stage that was written out: how many stages it became, and their names."""
    return [f"{name} is {len(names)} stages: {', '.join(names)}" for name, names in expanded.items()]


def members(expanded: Mapping[str, Sequence[str]], names: Sequence[str]) -> list[str]:
    """The same names, those of stages that were written out as all of their variants."""
    return list(dict.fromkeys(each for name in names for each in expanded.get(name, [name])))


def _asked(values: Mapping[str, Any], stages: Mapping[str, Any]) -> bool:
    varied = any(each.get(key) is not None for each in stages.values() for key in ("seeds", "grid"))
    return varied or values.get("seeds") is not None


def _parents(values: Mapping[str, Any], name: str) -> list[str]:
    """The stages that one names in `from`, `reward` and `teacher`, and whose rows it reads."""
    stages = values["stages"]
    stage = stages[name]
    reward = stage.get("reward")
    listed = reward if isinstance(reward, list) else [reward]
    named = [stage.get("from"), *(each.get("stage") if isinstance(each, dict) else each for each in listed)]
    teacher = stage.get("teacher")
    named += [teacher.get("stage") if isinstance(teacher, dict) else None, _sampled(values, stage)]
    return [each for each in dict.fromkeys(filter(None, map(_text, named))) if each in stages and each != name]


def _sampled(values: Mapping[str, Any], stage: Mapping[str, Any]) -> str | None:
    """The stage that samples the rows which this one reads; None where they come from files."""
    entries = values.get("data")
    entry = entries.get(_text(stage.get("data"))) if isinstance(entries, dict) else None
    return _text(entry.get("stage")) if isinstance(entry, dict) else None


def _expand_data(text: Text, points: Mapping[str, list[Point]]) -> None:
    """An entry for each variant of the stage whose rows it is."""
    entries = text.values.get("data")
    for name, entry in list(entries.items()) if isinstance(entries, dict) else ():
        source = _text(entry.get("stage")) if isinstance(entry, dict) else None
        if source is None or points.get(source, [{}]) == [{}]:
            continue
        del entries[name]
        for point in points[source]:
            new = variant(source, point)
            entries[_entry(name, source, new)] = {**entry, "stage": new}
            for table in (text.lines, text.given):
                for path, place in list(table.items()):
                    if path[:2] == ("data", name):
                        path = ("data", _entry(name, source, new), *path[2:])  # noqa: PLW2901
                        table.setdefault(path, place)  # pyright: ignore[reportArgumentType]


def _entry(name: str, source: str, new: str) -> str:
    """The data entry for a variant of its stage: `pairs-seed0` of `pairs`."""
    return name + new[len(source) :]


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _in_order(above: Mapping[str, list[str]]) -> list[str]:
    """Parents first. A circle is the graph's to refuse: what is in one comes as it stands."""
    done: dict[str, None] = {}
    waiting = list(above)
    while waiting:
        ready = [name for name in waiting if all(each in done for each in above[name])] or waiting
        done |= dict.fromkeys(ready)
        waiting = [name for name in waiting if name not in done]
    return list(done)


def _points(
    text: Text, stages: Mapping[str, Any], name: str, above: list[str], known: Mapping[str, list[Point]], shared: Any
) -> list[Point]:
    """What a stage varies over: what its parents do, joined, its grid, and seeds last."""
    stage, here = stages[name], ("stages", name)
    joined: list[Point] = [{}]
    for parent in above:
        theirs = known.get(parent, [{}])
        _same_seeds(text, here, joined, theirs, f"{parent}'s")
        pairs = itertools.product(joined, theirs)
        joined = [{**a, **b} for a, b in pairs if all(a[axis] == b[axis] for axis in a.keys() & b.keys())]
    own = [{}]
    for key, values in _grid(text, here, stage.get("grid")):
        own = [{**point, (name, key): value} for point in own for value in values]
    seeds = stage.get("seeds")
    if seeds is not None:
        _check_values(text, (*here, "seeds"), seeds, seeds=True)
        if stage.get("seed") is not None:
            raise problem(text, (*here, "seeds"), "stands beside seed", "keep one of them")
    elif shared is not None and stage.get("seed") is None:
        seeds = shared
    if seeds is not None and _seeds(joined) is None:
        own = [{**point, _SEED: seed} for point in own for seed in seeds]
    elif seeds is not None:
        _same_seeds(text, here, joined, [{_SEED: seed} for seed in seeds], "its own")
    both = [{**a, **b} for a, b in itertools.product(joined, own)]
    ordered = [dict(sorted(point.items(), key=lambda item: item[0] == _SEED)) for point in both]
    # the seeds of one combination beside each other
    apart = [{axis: value for axis, value in point.items() if axis != _SEED} for point in ordered]
    return [ordered[place] for place in sorted(range(len(ordered)), key=lambda place: apart.index(apart[place]))]


def _seeds(points: Sequence[Point]) -> set[int] | None:
    found = {point[_SEED] for point in points if _SEED in point}
    return found or None


def _same_seeds(text: Text, here: Path_, ours: Sequence[Point], theirs: Sequence[Point], whose: str) -> None:
    """Seeds of what belongs together are the same: none is left out in silence."""
    one, other = _seeds(ours), _seeds(theirs)
    if one is not None and other is not None and one != other:
        said = f"comes from stages with the seeds {sorted(one)}, and {whose} are {sorted(other)}"
        raise problem(text, here, said, "give them the same seeds, or write `seeds` once at the top")


def _grid(text: Text, here: Path_, grid: Any, above: str = "") -> Iterator[tuple[str, list[Any]]]:
    """(key with dots, its values) of each axis; `train: {learning_rate: [...]}` is `train.learning_rate: [...]`."""
    path: Path_ = (*here, "grid")
    if grid is None:
        return
    if not isinstance(grid, dict) or not grid:
        said = f"is {shown(grid)}, expected a mapping of keys to lists of values"
        raise problem(text, path, said, "write {beta: [0.03, 0.1]}")
    for name, values in grid.items():
        key = f"{above}.{name}" if above else str(name)
        if isinstance(values, dict):
            yield from _grid(text, here, values, key)
            continue
        if key in _FIXED:
            remedy = "write seeds: [...] beside it" if key == "seed" else "write a stage for each"
            raise problem(text, (*path, str(name)), f"{key} cannot be varied by a grid", remedy)
        _check_values(text, (*path, str(name)), values)
        yield key, values


def _check_values(text: Text, path: Path_, values: Any, *, seeds: bool = False) -> None:
    """A list of one value or more, each once."""
    wanted = "a list of seeds such as [0, 1, 2]" if seeds else "a list of values such as [0.03, 0.1]"
    fits = isinstance(values, list) and values
    kinds = int if seeds else (int, float, str, bool, type(None))
    if not fits or not all(isinstance(each, kinds) for each in values):
        raise problem(text, path, f"is {shown(values)}, expected {wanted}", "correct the value")
    if seeds and not all(0 <= each < 2**32 and not isinstance(each, bool) for each in values):
        raise problem(text, path, f"is {shown(values)}, expected whole numbers from 0 to 4294967295", "correct it")
    if len({json.dumps(each) for each in values}) < len(values):
        raise problem(text, path, f"is {shown(values)}, and holds a value twice", "keep one of them")


def _stage(
    stage: Any, name: str, point: Point, points: Mapping[str, list[Point]], sampled: str | None
) -> dict[str, Any]:
    """A stage's values at a point.

    Args:
        sampled: the stage whose rows it reads.
    """
    made = copy.deepcopy(stage)
    for key in ("seeds", "grid"):
        made.pop(key, None)
    for (origin, key), value in point.items():
        if origin == SEED:
            made.setdefault("seed", value)
        elif origin == name:
            part = made
            *above, last = key.split(".")
            for each in above:
                if not isinstance(part.get(each), dict):
                    part[each] = {}
                part = part[each]
            part[last] = value

    def at(parent: Any) -> Any:
        known = points.get(parent) if isinstance(parent, str) else None
        if not known:
            return parent
        # of the parent's points, the one that this one is an extension of
        fitting = (each for each in known if all(point.get(axis) == each[axis] for axis in each))
        return variant(parent, next(fitting, {}))

    if "from" in made:
        made["from"] = at(made["from"])
    if sampled is not None:
        made["data"] = _entry(made["data"], sampled, at(sampled))
    rewards = made.get("reward")
    for each in (*(rewards if isinstance(rewards, list) else [rewards]), made.get("teacher")):
        if isinstance(each, dict) and "stage" in each:
            each["stage"] = at(each["stage"])
    if isinstance(rewards, str):
        made["reward"] = at(rewards)
    elif isinstance(rewards, list):
        made["reward"] = [at(each) if isinstance(each, str) else each for each in rewards]
    return made


def _place(text: Text, name: str, new: str) -> None:
    """What is wrong with a stage that was written out stands where the stage does, or its grid."""
    for table in (text.lines, text.given):
        for path, place in list(table.items()):
            if path[:2] == ("stages", name):
                rest = path[2:]
                table.setdefault(("stages", new, *rest), place)  # pyright: ignore[reportArgumentType]
                if rest[:1] == ("grid",) and len(rest) > 1:
                    dotted = tuple(part for each in rest[1:] for part in str(each).split("."))
                    table[("stages", new, *dotted)] = place  # pyright: ignore[reportArgumentType]


def _name_all(text: Text, written: Mapping[str, Sequence[str]]) -> Iterator[UserError]:
    """Where the evaluation names a stage that was written out, it means all of its variants."""
    evaluation = text.values.get("eval")
    if not isinstance(evaluation, dict):
        return
    listed, judges = evaluation.get("policies"), evaluation.get("judges")
    if isinstance(listed, list):
        evaluation["policies"] = [new for each in listed for new in written.get(_text(each) or "", [each])]
    if isinstance(judges, list):
        evaluation["judges"] = [new for judge in judges for new in _judges(judge, written)]
    reference = _text(evaluation.get("reference")) or ""
    if reference is not None and reference in written:
        names = written[reference]
        said = f"{reference} is {len(names)} stages ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        remedy = f"name one of them, or base, or give {reference} a seed of its own: then it is one stage for all"
        yield problem(text, ("eval", "reference"), said, remedy)


def _judges(judge: Any, written: Mapping[str, Sequence[str]]) -> list[Any]:
    """One judge for each variant of the reward stage that it reads."""
    names = written.get(_text(judge.get("stage")) or "") if isinstance(judge, dict) else None
    if not names:
        return [judge]
    said = judge.get("name")
    return [{**judge, "stage": new, **({"name": f"{said}-{new}"} if said else {})} for new in names]
