"""What is wrong with a recipe, in the user's words: file, line, key, what was expected, what to do."""

from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..errors import UserError, nearest
from ..stages.kinds import stage_kind
from .schema import Recipe, stage_model
from .text import Path_, Text

# What people most often write beside `train` instead of in it.
_TRAIN_WORDS = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "warmup_steps",
    "lr_scheduler_type",
    "weight_decay",
    "max_grad_norm",
    "logging_steps",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "report_to",
    "packing",
)
_SHOWN = 60


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


def first_problem(error: ValidationError, text: Text) -> UserError:
    """The first of pydantic's findings, unknown keys before missing ones (the first is often why the second)."""
    found = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    entry = found[0]
    path = _path(entry["loc"])
    if entry["type"] == "extra_forbidden":
        return _unknown(text, path)
    if entry["type"] == "missing":
        missing, above = str(path[-1]), path[:-1]
        said = f"{dotted(above)} lacks {missing!r}" if above else f"{missing!r} is missing"
        return UserError(text.place(above), said, f"add {missing}: ...")
    return problem(text, path, f"is {shown(entry['input'])}, expected {_expected(entry)}", "correct the value")


def _path(loc: tuple[str | int, ...]) -> Path_:
    """Pydantic's location without the branch of a union, which it adds."""
    path = list(loc)
    while path and isinstance(path[-1], str) and ("[" in path[-1] or path[-1] in ("str", "literal")):
        path.pop()
    return tuple(path)


def _unknown(text: Text, path: Path_) -> UserError:
    key = str(path[-1])
    known = _known(text.values, path[:-1])
    if len(path) == 3 and path[0] == "stages" and key in _TRAIN_WORDS:
        return problem(text, path, "stands beside train", f"write it in {dotted(path[:-1])}.train")
    return problem(text, path, f"{key!r} is no key of {dotted(path[:-1]) or 'a recipe'}", nearest(key, known))


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
