"""The recipe's JSON schema, for an editor that completes and checks YAML: made from what the loader reads.

It says what each key takes by itself. What two keys say together, files and data are the loader's to check.
`recipe.schema.json` beside this file is written by `python -m preftune.recipes.json_schema`. Imports no torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..stages import fields
from ..stages.fields import FIELDS, PARAMETER, TRAINING, Field, Meaning
from ..stages.kinds import KINDS, Parameter, StageKind
from ..stages.scorers.kinds import KINDS as SCORERS
from .meanings import JUDGES, MEANINGS
from .schema import Recipe, stage_model

FILE = Path(__file__).with_name("recipe.schema.json")
DRAFT = "http://json-schema.org/draft-07/schema#"

Schema = dict[str, Any]
# A number may be written as text: `1e-4` is text in YAML 1.1.
_NUMBER: Schema = {"type": ["number", "string"], "pattern": r"^[-+]?[0-9.]+([eE][-+]?[0-9]+)?$"}
_TEXT: Schema = {"type": "string"}
_VALUES: dict[Meaning, Schema] = {
    fields.RATE: {**_NUMBER, "minimum": 0},
    fields.ABOVE_0: {**_NUMBER, "exclusiveMinimum": 0},
    fields.BELOW_1: {**_NUMBER, "minimum": 0, "exclusiveMaximum": 1},
    fields.SHARE: {**_NUMBER, "minimum": 0, "maximum": 1},
    fields.COUNT: {**_NUMBER, "minimum": 1, "multipleOf": 1},
    fields.COUNT_OR_0: {**_NUMBER, "minimum": 0, "multipleOf": 1},
    fields.LIMIT: {**_NUMBER, "minimum": -1, "multipleOf": 1, "not": {"const": 0}},
    fields.STEPS: {**_NUMBER, "exclusiveMinimum": 0},
    fields.WARMUP: {**_NUMBER, "minimum": 0},
    fields.SEED: {**_NUMBER, "minimum": 0, "maximum": 2**32 - 1, "multipleOf": 1},
    fields.FLAG: {"type": "boolean"},
    fields.TEXT: _TEXT,
    fields.TEXTS: {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]},
    fields.SETTINGS: {"type": "object"},
    fields.TEXT_OR_SETTINGS: {"type": ["string", "object"]},
    fields.MULTIPLE: {"anyOf": [{"const": "auto"}, {**_NUMBER, "minimum": 1, "multipleOf": 1}]},
    fields.PACKING: {"enum": ["bfd", "bfd_split"]},
    fields.OPEN: {},
}
"""What values of a field mean -> the schema of one."""


def recipe_schema() -> Schema:
    """The whole schema (draft 7), as plain values.

    Every kind of stage has a definition `KIND_stage`, chosen by `kind`, or by the stage's name where it has none.
    A kind of the user's own is taken as it is.
    """
    whole = Recipe.model_json_schema()
    definitions = whole["$defs"]
    for kind in KINDS.values():
        definitions[f"{kind.name}_stage"] = _stage(kind, definitions)
    definitions["stage"] = _any_stage()
    named = {"if": {"required": ["kind"]}, "then": {"$ref": "#/$defs/stage"}}
    whole["properties"]["stages"] |= {
        "properties": {name: {**named, "else": {"$ref": f"#/$defs/{name}_stage"}} for name in KINDS},
        "additionalProperties": {"allOf": [{"required": ["kind"]}, {"$ref": "#/$defs/stage"}]},
    }
    # a source of scores has the fields of its kind
    source = definitions["Reward"]
    source["properties"]["kind"] = {"enum": list(SCORERS)}
    for name, kind in SCORERS.items():
        for field in kind.fields:
            source["properties"].setdefault(field, {"description": JUDGES[name][field]})
    source["additionalProperties"] = False
    # the name of a data entry stands for the entry
    prompts = definitions["Eval"]["properties"]["prompts"]
    definitions["Eval"]["properties"]["prompts"] = {"anyOf": [_TEXT, prompts]}
    for part, meanings in MEANINGS.items():
        for definition in [whole] if part == "Recipe" else _definitions(part, definitions):
            _explain(definition["properties"], meanings)
    return {"$schema": DRAFT, **_without_titles(whole), "title": "A recipe of preftune"}


def _definitions(part: str, definitions: Schema) -> list[Schema]:
    return [definitions[f"{name}_stage"] for name in KINDS] if part == "Stage" else [definitions[part]]


def _explain(keys: Schema, meanings: Mapping[str, str]) -> None:
    """Each key's own line of meaning, where the schema has none that is nearer to it."""
    for key in keys.keys() & meanings.keys():
        own = keys[key]
        # draft 7 reads nothing beside a `$ref`
        keys[key] = {**({"allOf": [own]} if "$ref" in own else own), "description": meanings[key]}


def _any_stage() -> Schema:
    """A stage that says its kind."""
    chosen = [
        {
            "if": {"properties": {"kind": {"const": name}}, "required": ["kind"]},
            "then": {"$ref": f"#/$defs/{name}_stage"},
        }
        for name in KINDS
    ]
    kinds = {"anyOf": [{"enum": list(KINDS)}, {"type": "string", "pattern": ":"}]}
    return {"type": "object", "properties": {"kind": kinds}, "allOf": chosen}


def _stage(kind: StageKind, definitions: Schema) -> Schema:
    """A stage of that kind; the parts that it has are added to the definitions."""
    schema = stage_model(kind).model_json_schema()
    definitions |= schema.pop("$defs")
    keys = schema["properties"]
    # it is the name, where it is left out
    schema["required"] = [each for each in schema.get("required", ()) if each != "kind"]
    adapter = {"type": "object", "properties": {"adapter": _TEXT}, "required": ["adapter"]}
    keys["from"] = {"anyOf": [_TEXT, {**adapter, "additionalProperties": False}]}
    keys["data"] = {"anyOf": [_TEXT, {"allOf": [{"$ref": "#/$defs/Data"}], "required": ["stage"]}]}
    if kind.needs_reward:
        source = {"anyOf": [_TEXT, {"$ref": "#/$defs/Reward"}]}
        keys["reward"] = {"anyOf": [*source["anyOf"], {"type": "array", "items": source, "minItems": 1}]}
    if kind.needs_teacher:
        keys["teacher"] = {"anyOf": [_TEXT, {"$ref": "#/$defs/Teacher"}]}
    for group, names in kind.groups.items():
        own = definitions[f"{kind.name}_{group}"]
        for key, name in names.items():
            own["properties"][key] |= _described(kind.parameter(name))
        # a number stands for the first key
        keys[group] = {"anyOf": [{"type": "number"}, {"$ref": f"#/$defs/{kind.name}_{group}"}]}
    for parameter in kind.alone():
        keys[parameter.name] |= _described(parameter)
    if kind.full_learning_rate is None:
        keys["full"] = {"enum": [False], "doNotSuggest": True}
    if not kind.trains:
        for key in ("train", "lora", "on_nonfinite"):
            del keys[key]
        return {**schema, "description": kind.title.removeprefix("The ").capitalize()}
    table = FIELDS.get(kind.config.rpartition(":")[2], TRAINING)
    train = {name: _field(name, field, kind, keys) for name, field in sorted(table.items())}
    keys["train"] = {"type": "object", "properties": train, "additionalProperties": False}
    return {**schema, "description": kind.title.removeprefix("The ").capitalize()}


def _described(parameter: Parameter) -> Schema:
    return {"description": parameter.help, "default": parameter.default}


def _field(name: str, field: Field, kind: StageKind, keys: Schema) -> Schema:
    """A field of `train`. One that is refused may still say that it is off."""
    if field.state != "works":
        return {"enum": [None, False], "description": field.says, "doNotSuggest": True}
    if field is PARAMETER:
        return {**_parameter(name, kind, keys), "doNotSuggest": True}
    value = _VALUES[field.meaning]
    said = "; ".join(filter(None, (field.meaning.words, field.says)))
    default = {"default": kind.defaults[name]} if name in kind.defaults else {}
    return {**({"anyOf": [value, {"type": "null"}]} if field.optional else value), "description": said, **default}


def _parameter(name: str, kind: StageKind, keys: Schema) -> Schema:
    """A parameter of the method, which `train` takes as well."""
    if name in keys:
        return keys[name]
    return {"description": kind.parameter(name).help}


def _without_titles(schema: Any) -> Any:
    """Without pydantic's titles, which say each key again."""
    if isinstance(schema, list):
        return [_without_titles(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _without_titles(each) for key, each in schema.items() if not (key == "title" and isinstance(each, str))
    }


def schema_text() -> str:
    """The schema as `preftune schema` prints it."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False)


if __name__ == "__main__":
    FILE.write_text(schema_text() + "\n", encoding="utf-8")
