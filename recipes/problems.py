"""What is wrong with a recipe, in the user's words: file, line, key, what was expected, what to do."""

import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..errors import UserError, closest, nearest
from ..stages.fields import FIELDS, TRAINING, WORDS
from ..stages.kinds import stage_kind
from .schema import Eval, Lora, Model, Recipe, stage_model
from .text import Path_, Text

_SHOWN = 60
_PARTS = {"model": Model.model_fields, "lora": Lora.model_fields, "eval": Eval.model_fields}
# What people write for a key, by the part of the recipe that has the key.
_ALIASES: dict[str, dict[str, str]] = {
    "model": {
        **dict.fromkeys(("name", "path", "id", "model_name", "model_name_or_path", "base_model", "model_id"), "base"),
        **dict.fromkeys(("torch_dtype", "precision"), "dtype"),
        **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quant", "quantize", "bits"), "quantization"),
        "template": "chat_template",
    },
    "lora": {
        **dict.fromkeys(("rank", "lora_r", "lora_rank"), "r"),
        **dict.fromkeys(("lora_alpha",), "alpha"),
        **dict.fromkeys(("lora_dropout",), "dropout"),
        **dict.fromkeys(("targets", "modules", "lora_target", "lora_target_modules"), "target_modules"),
        "rslora": "use_rslora",
    },
    "data": {
        **dict.fromkeys(("file", "files", "dataset", "url", "id", "train", "data_path"), "path"),
        **dict.fromkeys(("test_size", "eval_split", "val_size", "validation_split", "holdout"), "held_out"),
        **dict.fromkeys(("max_seq_length", "max_len", "cutoff_len", "seq_len"), "max_length"),
        **dict.fromkeys(("max_samples", "num_samples", "n", "max_rows"), "limit"),
        **dict.fromkeys(("column_mapping", "mapping", "fields"), "columns"),
        **dict.fromkeys(("on_error", "on_errors", "on_bad_rows", "on_bad_lines", "errors", "problems"), "on_problem"),
        "system_prompt": "system",
    },
    "stages": {
        **dict.fromkeys(("parent", "start", "start_from", "base", "init", "ref", "ref_model", "reference"), "from"),
        **dict.fromkeys(("type", "method", "algorithm", "stage"), "kind"),
        **dict.fromkeys(("dataset", "train_data", "path"), "data"),
        **dict.fromkeys(("rewards", "reward_model", "reward_funcs", "rm"), "reward"),
        **dict.fromkeys(("training", "args", "trainer", "train_args", "hyperparameters"), "train"),
        **dict.fromkeys(("loss",), "loss_type"),
    },
    "eval": {
        **dict.fromkeys(("judge", "metrics"), "judges"),
        **dict.fromkeys(("models",), "policies"),
        **dict.fromkeys(("baseline",), "reference"),
        **dict.fromkeys(("max_tokens", "max_length"), "max_new_tokens"),
        **dict.fromkeys(("data", "dataset"), "prompts"),
    },
    "recipe": {
        **dict.fromkeys(("datasets", "dataset"), "data"),
        **dict.fromkeys(("stage", "steps", "pipeline", "chain"), "stages"),
        **dict.fromkeys(("evaluation", "evaluate"), "eval"),
        **dict.fromkeys(("peft", "adapter"), "lora"),
        **dict.fromkeys(("run_name", "title"), "name"),
        **dict.fromkeys(("random_seed",), "seed"),
    },
}
_LAUNCH = "use --launch CONFIG, which `accelerate config --config_file CONFIG` writes"
# Words that no part of a recipe has -> what to do.
_ELSEWHERE = {
    **dict.fromkeys(("gpus", "num_gpus", "devices", "num_processes", "nodes", "deepspeed", "fsdp"), _LAUNCH),
    **dict.fromkeys(("output_dir", "output", "out", "save_dir"), "use --output-dir"),
}


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
    key, above = str(path[-1]), path[:-1]
    train = len(path) == 3 and path[0] == "stages"
    if train and _trains(text.values, path):
        return problem(text, path, "stands beside train", f"write it in {dotted(above)}.train")
    said = f"{key!r} is no key of {dotted(above) or 'a recipe'}"
    return problem(text, path, said, _meant(key, path) or nearest(key, _known(text.values, above)))


def _trains(values: Any, path: Path_) -> bool:
    """Whether the key of a stage is a field of the kind's config."""
    stage = _below(_below(values, "stages"), path[1])
    name = stage_kind(str(stage["kind"])).config.rpartition(":")[2]
    return str(path[-1]) in FIELDS.get(name, TRAINING)


def _meant(key: str, path: Path_) -> str | None:
    """What to do about a key that people write for another, or in another part of the recipe; None: nothing known."""
    place = "recipe" if len(path) == 1 else "lora" if "lora" in path[:-1] else str(path[0])
    own = _ALIASES.get(place, {})
    if key in own:
        return f"did you mean {own[key]!r}?"
    in_stage = place == "stages" and len(path) >= 3
    train = f"{dotted(path[:2])}.train" if in_stage else "stages.NAME.train"
    if in_stage and key in WORDS:
        return f"write {WORDS[key]} in {train}"
    if key in _ELSEWHERE:
        return _ELSEWHERE[key]
    for part, keys in _PARTS.items():
        if place != part and (key in keys or key in _ALIASES[part]):
            return f"write it in {part}: {{{_ALIASES[part].get(key, key)}: ...}}"
    if key in WORDS:
        return f"write {WORDS[key]} in {train}"
    return f"write it in {train}" if key in TRAINING else None


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
