"""From a file, or a shipped recipe's name, and overrides to a checked recipe."""

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..data.sources import find
from ..errors import UserError, gathering, nearest, raise_found
from ..files import ADAPTER_CONFIG
from ..stages.kinds import KINDS, VARIANTS, stage_kind
from .confidential import secret_problems, shown_override
from .expansion import expand, in_words_once, name_all
from .graph import fill_eval, graph_problems
from .over_optimisation import settle_over_optimisation
from .parents import settle_parents
from .problems import dotted, places_of, problem, schema_problems, shown
from .schema import Recipe, Teacher
from .text import Path_, Text, parse_file, parse_value, plain_value, read_text

SHIPPED = Path(__file__).parent
_TEXT_FILES = (".txt", ".md", ".j2", ".jinja")
# Their entries have names of the user's: an override cannot make one up by a slip of the pen.
_NAMED = ("data", "stages")
Overrides = Sequence[str] | Mapping[str, Any]
"""`stages.dpo.beta=0.2` each, or values of Python's by key: with dots, nested, or both."""


def shipped_recipes() -> list[Path]:
    """The recipes that come with the package, by name."""
    return sorted(SHIPPED.glob("*.yaml"))


def load_recipe(path_or_name: str | Path, overrides: Overrides = ()) -> Recipe:
    """Read, override, check and fill in a recipe.

    Args:
        path_or_name: a YAML file, or the name of a shipped recipe.
        overrides: `stages.dpo.beta=0.2`, values in YAML; a whole entry may be given, or removed with `null`. In a
            mapping {"stages.dpo.beta": 0.2} and {"stages": {"dpo": {"beta": 0.2}}} say the same, and None removes.

    Raises:
        UserError: whatever is wrong, with file, line and key.
    """
    file = find_recipe(path_or_name)
    return _recipe(_read(file), file.resolve(), overrides)


def recipe_of(values: Mapping[str, Any], folder: Path, overrides: Overrides = ()) -> Recipe:
    """As `load_recipe`, from a recipe's values in memory.

    Args:
        folder: where its relative paths are looked up.
    """
    text = Text("recipe", plain_value(values, "recipe"))
    return _recipe(text, folder.resolve() / "recipe", overrides)


def _recipe(text: Text, file: Path, overrides: Overrides) -> Recipe:
    found: list[UserError] = []
    _apply(text, overrides, found)
    # before anything else is said of such a value
    raise_found(secret_problems(text))
    complete = _normalise(text, file.parent, found)
    _read_files(text, file.parent, found)
    raise_found(secret_problems(text))
    recipe = _validated(text, found)
    if recipe is not None and complete:
        # what follows from a key that is refused already is not said as well
        found += [each for each in graph_problems(recipe, text) if not any(map(partial(_same_place, each), found))]
    if recipe is None or found:
        raise_found(in_words_once(found, text.values.get("expanded")))
    assert recipe is not None  # or something was found
    for stage in recipe.stages.values():
        # stated, so that nobody need guess what a stage was trained with
        method = stage.method()
        stage.train |= {
            key: each for key, each in stage.record.defaults.items() if key not in {**stage.train, **method}
        }
    recipe._origin, recipe._places = file, text.places()
    _place_files(recipe, file.parent)
    fill_eval(recipe)
    settle_over_optimisation(recipe, text)
    return recipe


def _read(file: Path) -> Text:
    text = parse_file(file)
    if not isinstance(text.values, dict):
        raise UserError(str(file), f"is {shown(text.values)}, expected a mapping of keys", "see `preftune recipes`")
    return text


def _validated(text: Text, found: list[UserError]) -> Recipe | None:
    """The recipe, its problems added to `found`; without the keys that they are about, where it is one without them."""
    try:
        return Recipe.model_validate(text.values)
    except ValidationError as error:
        found += schema_problems(error, text)
        values = copy.deepcopy(text.values)
        pruned = all([_without(values, path) for path in places_of(error, text.values)])
    try:
        return Recipe.model_validate(values) if pruned else None
    except ValidationError:
        return None


def _without(values: Any, path: Path_ | None) -> bool:
    """Take a key out; False where that is not possible."""
    for part in path[:-1] if path else ():
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return False
    if path and isinstance(values, dict):
        values.pop(path[-1], None)
        return True
    return False


def _same_place(one: UserError, other: UserError) -> bool:
    """Whether one is about a key of the recipe that the other is about, or holds, or is held by."""
    ours, theirs = (each.where.rpartition(": ")[2].split(".") for each in (one, other))
    shared = min(len(ours), len(theirs))
    return ours[:shared] == theirs[:shared]


def find_recipe(path_or_name: str | Path) -> Path:
    """The file of a recipe given as a path or by a shipped one's name."""
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return path
    shipped = {file.stem: file for file in shipped_recipes()}
    if (name := str(path_or_name)) in shipped:
        return shipped[name]
    if path.is_dir():
        raise UserError(str(path), "is a folder, expected a recipe", f"give a YAML file such as {path / 'recipe.yaml'}")
    raise UserError(name, "no such recipe, neither a file nor a shipped one", nearest(name, shipped))


def _apply(text: Text, overrides: Overrides, found: list[UserError]) -> None:
    """Set every override in the values; what is wrong with one is added to `found`."""
    if not isinstance(overrides, Mapping):
        for override in overrides:
            with gathering(found):
                _override(text, override)
        return
    for key, value in overrides.items():
        with gathering(found):
            where = f"override ({shown_override(f'{key}={value}')})"
            _merge(text, _path(str(key), where), plain_value(value, where), where)


def _override(text: Text, override: str) -> None:
    where = f"command line ({shown_override(override)})"
    key, equals, raw = override.partition("=")
    if not equals or not key:
        raise UserError(where, "expected key=value", "write for example stages.dpo.beta=0.2")
    path = _path(key, where)
    _put(text, path, parse_value(raw, where), where)


def _path(key: str, where: str) -> Path_:
    parts = re.sub(r"\[(\d+)\]", r".\1", key.strip()).split(".")
    if not all(parts):
        raise UserError(where, f"{key.strip()!r} has an empty part", "write for example stages.dpo.beta=0.2")
    return tuple(int(part) if re.fullmatch("[0-9]+", part) else part for part in parts)


def _merge(text: Text, path: Path_, value: Any, where: str) -> None:
    """A mapping changes the keys that it has in one that is there; anything else takes the place of what is there."""
    there: Any = text.values
    for part in path:
        there = there.get(part) if isinstance(there, dict) else None
    if not (isinstance(there, dict) and isinstance(value, dict)):
        _put(text, path, value, where)
        return
    for key, each in value.items():
        _merge(text, (*path, key), each, where)


def _put(text: Text, path: Path_, value: Any, where: str) -> None:
    values: Any = text.values
    part: Any
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(values, list):
            if not isinstance(part, int) or part >= len(values):
                raise UserError(where, f"{dotted(path[:depth])} has entries 0 to {len(values) - 1}", "name one of them")
        elif not isinstance(values, dict):
            raise UserError(where, f"{dotted(path[:depth])} is {shown(values)} and has no keys", "correct the key")
        else:
            part = str(part)  # noqa: PLW2901
            path = (*path[:depth], part, *path[depth + 1 :])
            if depth == 1 and path[0] in _NAMED and part not in values and not (last and isinstance(value, dict)):
                raise UserError(where, f"no {part!r} in {path[0]}", nearest(part, map(str, values)))
        if last:
            _set(values, part, value)
        else:
            if isinstance(values, dict) and values.get(part) is None:
                values[part] = {}
            values = values[part]
    text.given[path] = where
    _take_from_here(text, path)


def _set(values: Any, key: str | int, value: Any) -> None:
    if value is None and isinstance(values, dict):
        values.pop(key, None)
    else:
        values[key] = value


def _take_from_here(text: Text, path: Path_) -> None:
    """A path on the command line is meant from the current folder, one in the recipe from the recipe's."""
    if path[-1] not in ("path", "base", "chat_template", "adapter", "include_path"):
        return
    above: Any = text.values
    for part in path[:-1]:
        above = above[part]
    value = above.get(path[-1])
    if isinstance(value, str) and Path(value).expanduser().exists():
        above[path[-1]] = str(Path(value).expanduser().resolve())


def _normalise(text: Text, folder: Path, found: list[UserError]) -> bool:
    """Write out what a recipe may leave out: a stage's kind by its name, its parent, the evaluation's prompts; and what
    it may write in a stage that has a place of its own.

    What is wrong is added to `found`; stages that cannot be read are taken out of the values, and the answer is False.
    """
    stages, data, evaluation = (text.values.get(key) for key in ("stages", "data", "eval"))
    bad = []
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        before = len(found)
        with gathering(found):
            _settle_kind(text, name, stage, folder)
            _place_adapter(stage, folder)
            _name_data(text, name, stage)
        bad += [name] if len(found) > before else []
    for name in bad:
        del stages[name]
    found += settle_parents(text)
    if isinstance(evaluation, dict) and isinstance(prompts := evaluation.get("prompts"), str):
        if isinstance(data, dict) and isinstance(data.get(prompts), dict):
            evaluation["prompts"] = dict(data[prompts])
            text.copied.add(("eval", "prompts"))
        else:
            known = data if isinstance(data, dict) else {}
            said = f"{prompts!r} is no data entry"
            found.append(problem(text, ("eval", "prompts"), said, nearest(prompts, map(str, known))))
            # something in its place, so that the rest can be looked at
            evaluation["prompts"] = {"path": prompts}
    if bad and not stages:
        raise_found(found)
    if bad:
        return False
    unsound = [*expand(text), *name_all(text)]
    found += unsound
    return not unsound


def _settle_kind(text: Text, name: str, stage: Any, folder: Path) -> None:
    if not isinstance(stage, dict):
        raise problem(text, ("stages", name), f"is {shown(stage)}, expected a mapping of keys", "write {from: ...}")
    if "kind" not in stage:
        if name not in KINDS:
            remedy = VARIANTS.get(str(name).lower()) or f"add kind: one of {', '.join(KINDS)}"
            raise problem(text, ("stages", name), "lacks its kind", remedy)
        stage["kind"] = name
    elif not isinstance(stage["kind"], str):
        said = f"is {shown(stage['kind'])}, expected a name"
        raise problem(text, ("stages", name, "kind"), said, f"use one of {', '.join(KINDS)}")
    else:
        _place_kind(text, name, stage, folder)


def _place_adapter(stage: dict[str, Any], folder: Path) -> None:
    """An adapter from outside the run lies beside the recipe, or where its path says."""
    parent = stage.get("from")
    if isinstance(parent, dict) and isinstance(named := parent.get("adapter"), str):
        parent["adapter"] = str((folder / Path(named).expanduser()).resolve())


def _name_data(text: Text, name: str, stage: dict[str, Any]) -> None:
    """`data: {stage: pairs}` in a stage becomes a data entry by the name of the stage that samples the rows."""
    entry = stage.get("data")
    if not isinstance(entry, dict):
        return
    path: Path_ = ("stages", name, "data")
    source = entry.get("stage")
    if not isinstance(source, str):
        said = f"is {shown(entry)}, expected the name of a data entry, or {{stage: NAME}}"
        raise problem(text, path, said, "write the entry under data, and its name here")
    if not isinstance(text.values.get("data"), dict):
        text.values["data"] = {}
    entries = text.values["data"]
    if entries.setdefault(source, entry) != entry:
        said = f"the data entry {source!r} says something else than this stage does"
        raise problem(text, path, said, f"write data: {source}, or give this one an entry of its own under data")
    for table in (text.lines, text.given):
        for known, place in list(table.items()):
            if known[:3] == path:
                table.setdefault(("data", source, *known[3:]), place)  # pyright: ignore[reportArgumentType]
    stage["data"] = source


def _place_kind(text: Text, name: str, stage: dict[str, Any], folder: Path) -> None:
    """A kind must be one that there is. A method's file lies beside the recipe, or where its path says."""
    home, colon, record = stage["kind"].rpartition(":")
    if colon and home.endswith(".py"):
        stage["kind"] = f"{(folder / Path(home).expanduser()).resolve()}:{record}"
    where = ("stages", name, "kind")
    stage_kind(stage["kind"], f"{text.place(where)}: {dotted(where)}")


def _read_files(text: Text, folder: Path, found: list[UserError]) -> None:
    """What a judge or a source of scores may name a file for: a rubric's `checks`, a JSON `schema`, a `prompt`.

    The run keeps what the file said, so later edits change no old result.
    """
    for path, entry in _scorers(text.values):
        for key in ("checks", "schema"):
            if isinstance(named := entry.get(key), str):
                with gathering(found):
                    entry[key] = _values(_file(text, (*path, key), named, folder))
        named = entry.get("prompt")
        if isinstance(named, str) and "\n" not in named and (named.endswith(_TEXT_FILES) or len(named.split()) == 1):
            with gathering(found):
                entry["prompt"] = read_text(_file(text, (*path, "prompt"), named, folder))


def _values(file: Path) -> Any:
    """What a YAML file holds, or a JSON file, whose tabs YAML would refuse."""
    if file.suffix != ".json":
        return parse_file(file).values
    try:
        return json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(str(file), f"is no JSON ({error})", "correct the file") from error


def _scorers(values: Any) -> Iterator[tuple[Path_, dict[str, Any]]]:
    """The judges and the sources of scores, with their places."""
    evaluation, stages = values.get("eval"), values.get("stages")
    several: list[tuple[Path_, Any]] = []
    if isinstance(evaluation, dict):
        several.append((("eval", "judges"), evaluation.get("judges")))
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        if isinstance(stage, dict):
            several.append((("stages", name, "reward"), stage.get("reward")))
    for path, entries in several:
        if isinstance(entries, dict):
            yield path, entries
        for place, entry in enumerate(entries if isinstance(entries, list) else ()):
            if isinstance(entry, dict):
                yield (*path, place), entry


def _file(text: Text, path: Path_, named: str, folder: Path) -> Path:
    file = find(named, (folder,))
    if file is None or not file.is_file():
        raise problem(text, path, f"no file {named!r}", "correct the path")
    return file


def _place_files(recipe: Recipe, folder: Path) -> None:
    """Paths that exist beside the recipe become absolute, so that the resolved recipe works from anywhere."""

    def placed(path: str) -> str:
        given = Path(path).expanduser()
        return str((folder / given).resolve()) if (folder / given).exists() else path

    entries = [*recipe.data.values(), *([recipe.eval.prompts] if recipe.eval else [])]
    for entry in entries:
        for each in (entry, *(entry.sources or ())):
            if each.path is not None:
                each.path = placed(each.path)
    for judge in recipe.eval.judges if recipe.eval else ():
        named = ("votes", "adapter", "cache", *(("model",) if judge.get("kind") == "model" else ()))
        judge.update({key: placed(judge[key]) for key in named if isinstance(judge.get(key), str)})
    for stage in recipe.stages.values():
        for extra in (each.model_extra or {} for each in stage.rewards):
            extra.update({key: placed(extra[key]) for key in ("adapter", "cache") if isinstance(extra.get(key), str)})
        if (teacher := stage.taught_by) is not None:
            _place_teacher(teacher, placed)
    if recipe.eval is not None and (asked := recipe.eval.benchmarks) is not None:
        asked.tasks = [placed(each) if each.endswith((".yaml", ".yml")) else each for each in asked.tasks]
        asked.include_path = None if asked.include_path is None else placed(asked.include_path)
    model = recipe.model
    if not model.base.startswith(("pypi:", "random:", "added:")):
        model.base = placed(model.base)
    if model.chat_template is not None and "{" not in model.chat_template:
        model.chat_template = placed(model.chat_template)


def _place_teacher(teacher: Teacher, placed: Callable[[str], str]) -> None:
    """Its path made absolute; a model that is the folder of an adapter is one."""
    if teacher.adapter is not None:
        teacher.adapter = placed(teacher.adapter)
    if teacher.model is not None and not teacher.model.startswith(("pypi:", "random:")):
        teacher.model = placed(teacher.model)
        if teacher.revision is None and (Path(teacher.model).expanduser() / ADAPTER_CONFIG).is_file():
            teacher.adapter, teacher.model = teacher.model, None
