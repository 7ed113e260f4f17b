"""What is wrong with a recipe, in the user's words: file, line, key, what was expected, what to do."""

import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..errors import UserError, closest, nearest
from ..stages.fields import FIELDS, PARAMETER, TRAINING
from ..stages.kinds import StageKind, stage_kind
from ..stages.names import meant, meant_in_group
from .schema import Eval, Lora, Model, Recipe, stage_model
from .text import Path_, Text

_SHOWN = 60
_PARTS = {"model": Model.model_fields, "lora": Lora.model_fields, "eval": Eval.model_fields}


def dotted(path: Path_) -> str:
    """stages.dpo.beta"""
    return ".".join(str(each) for each in path)


def shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def problem(text: Text, path: Path_, what: str, remedy: str) -> UserError:
    """An error at one key of the recipe."""
    where = f"{text.place(path)}: {dotted(path)}" if path else text.place(path)
    return UserError(where, what, remedy)


def schema_problems(error: ValidationError, text: Text) -> list[UserError]:
    """What pydantic found, unknown keys before missing ones (an unknown one is often why another is missing)."""
    found = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    above = {_path(each["loc"], text.values)[:-1] for each in found if each["type"] == "extra_forbidden"}
    said: dict[str, UserError] = {}
    for entry in found:
        path = _path(entry["loc"], text.values)
        copied = any(path[: len(each)] == each and len(path) > len(each) for each in text.copied)
        if copied or (entry["type"] == "missing" and path[:-1] in above):
            continue
        # the branches of a union each say that the value is none of theirs
        said.setdefault(dotted(path), _problem_of(entry, path, text))
    return list(said.values())


def places_of(error: ValidationError, values: Any) -> list[Path_ | None]:
    """The keys that pydantic's findings are about; None for one that is missing."""
    return [None if each["type"] == "missing" else _path(each["loc"], values) for each in error.errors()]


def _problem_of(entry: ErrorDetails, path: Path_, text: Text) -> UserError:
    if entry["type"] == "extra_forbidden":
        return _unknown(text, path)
    if entry["type"] == "missing":
        missing, above = str(path[-1]), path[:-1]
        said = f"{dotted(above)} lacks {missing!r}" if above else f"{missing!r} is missing"
        return UserError(text.place(above), said, f"add {missing}: ...")
    said = f"is {shown(entry['input'])}, expected {_expected(entry)}"
    options = re.findall(r"'([^']+)'", _expected(entry)) if entry["type"] == "literal_error" else []
    near = closest(entry["input"], options, 0.6) if isinstance(entry["input"], str) else None
    return problem(text, path, said, f"did you mean {near!r}?" if near else "correct the value")


def _path(loc: tuple[str | int, ...], values: Any) -> Path_:
    """Pydantic's location without the branch of a union, which it adds behind the key: that is no key of the values."""
    for length, part in enumerate(loc):
        union = isinstance(part, str) and ("[" in part or part in ("str", "literal"))
        if union and not (isinstance(values, dict) and part in values):
            return loc[:length]
        values = _below(values, part)
    return loc


def _unknown(text: Text, path: Path_) -> UserError:
    key, names = str(path[-1]), [str(each) for each in path]
    said = f"{key!r} is no key of {dotted(path[:-1]) or 'a recipe'}"
    stage = _below(_below(text.values, "stages"), path[1]) if len(path) > 2 and names[0] == "stages" else None
    if stage is None:
        remedy = meant(key, _part(names))
    else:
        kind = stage_kind(str(stage["kind"]))
        field = FIELDS.get(kind.config.rpartition(":")[2], TRAINING).get(key)
        if len(path) == 3 and field is not None and field.state == "works" and field is not PARAMETER:
            return problem(text, path, "stands beside train", f"write it in {dotted(path[:-1])}.train")
        remedy = _meant_in_stage(key, kind, names)
    remedy = remedy or _elsewhere(key, names)
    return problem(text, path, said, remedy or nearest(key, _known(text.values, path[:-1])))


def _meant_in_stage(key: str, kind: StageKind, names: list[str]) -> str | None:
    if len(names) == 3:
        return meant(key, "stages", kind, names[1])
    if names[2] in kind.groups:
        return meant_in_group(key, kind, names[2])
    # a stage's `lora` and `reward` have words of their own
    return meant(key, names[2])


def _part(names: list[str]) -> str:
    """The part of the recipe that a key is one of, as `stages/names.py` calls them."""
    if len(names) == 1:
        return "recipe"
    return "data" if names[:2] == ["eval", "prompts"] and len(names) > 2 else names[0]


def _elsewhere(key: str, names: list[str]) -> str | None:
    """The part of the recipe that has a key of that name; None where none has."""
    having = (part for part, keys in _PARTS.items() if names[0] != part and key in keys)
    return next((f"write it in {part}: {{{key}: ...}}" for part in having), None)


def _known(values: Any, path: Path_) -> list[str]:
    """The keys that the schema has at that place."""
    model: type[BaseModel] | None = Recipe
    for depth, key in enumerate(path):
        values = _below(values, key)
        if depth == 1 and path[0] == "stages":
            model = stage_model(stage_kind(str(values.get("kind", key)) if isinstance(values, dict) else str(key)))
        elif isinstance(key, int) or (depth == 1 and path[0] == "data"):
            continue  # a list's or a mapping's entries are what it is made of
        elif model is not None:
            model = _model_of(_annotation(model, str(key)))
    if model is None:
        return []
    return [field.alias or name for name, field in model.model_fields.items()]


def _annotation(model: type[BaseModel], key: str) -> object:
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    return fields[key].annotation if key in fields else None


def _model_of(annotation: object) -> type[BaseModel] | None:
    """The one pydantic model within an annotation such as list[Reward] or dict[str, Data]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := _model_of(each)) is not None), None)


def _below(values: Any, key: str | int) -> Any:
    try:
        return values[key]
    except (KeyError, IndexError, TypeError):
        return None


_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "dict": "a mapping",
    "model": "a mapping of keys",
}


def _expected(entry: ErrorDetails) -> str:
    kind, context = entry["type"], entry.get("ctx", {})
    if kind == "literal_error":
        return str(context["expected"])
    for name, words in _TYPES.items():
        if kind.startswith(name) and kind.endswith(("_type", "_parsing", "_from_float")):
            return words
    if kind == "string_pattern_mismatch":
        return "letters, digits, dots, dashes and underscores"
    for limit, words in (("gt", "more than"), ("ge", "at least"), ("lt", "less than"), ("le", "at most")):
        if limit in context:
            return f"{words} {context[limit]:g}"
    return str(entry["msg"])[0].lower() + str(entry["msg"])[1:]
