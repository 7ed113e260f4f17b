"""The schema takes every shipped recipe, refuses what the loader refuses of a key by itself, and says what keys are."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from preftune.cli.main import run_command
from preftune.errors import UserError
from preftune.recipes.json_schema import FILE, recipe_schema, schema_text
from preftune.recipes.load import load_recipe, shipped_recipes
from preftune.recipes.schema import stage_model
from preftune.recipes.text import parse_file
from preftune.stages.fields import FIELDS, PARAMETER
from preftune.stages.kinds import KINDS

SCHEMA = recipe_schema()
ABOUT = {"$schema", "$defs", "title", "description", "default", "format", "doNotSuggest"}
TYPES: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def _is(value: Any, kind: str) -> bool:
    if kind in ("number", "integer"):
        whole = kind == "number" or isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return isinstance(value, int | float) and not isinstance(value, bool) and whole
    return isinstance(value, TYPES[kind])


def _among(value: Any, options: list[Any]) -> bool:
    return any(value == each and type(value) is type(each) for each in options)


def _object(schema: dict[str, Any], value: dict[str, Any]) -> bool:
    known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
    enough = len(value) >= schema.get("minProperties", 0)
    return (
        enough
        and all(each in value for each in schema.get("required", ()))
        and all(fits(known[key], each) if key in known else fits(more, each) for key, each in value.items())
    )


def _array(schema: dict[str, Any], value: list[Any]) -> bool:
    return len(value) >= schema.get("minItems", 0) and all(fits(schema.get("items", True), each) for each in value)


def _number(schema: dict[str, Any], value: float) -> bool:
    return (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
        and ("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"])
        and ("multipleOf" not in schema or value % schema["multipleOf"] == 0)
    )


def _chosen(schema: dict[str, Any], value: Any) -> bool:
    branch = "then" if fits(schema["if"], value) else "else"
    return fits(schema.get(branch, True), value)


KEYWORDS: dict[str, Any] = {
    "$ref": lambda schema, value: fits(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], value),
    "type": lambda schema, value: any(
        _is(value, each) for each in ([schema["type"]] if isinstance(schema["type"], str) else schema["type"])
    ),
    "enum": lambda schema, value: _among(value, schema["enum"]),
    "const": lambda schema, value: _among(value, [schema["const"]]),
    "anyOf": lambda schema, value: any(fits(each, value) for each in schema["anyOf"]),
    "allOf": lambda schema, value: all(fits(each, value) for each in schema["allOf"]),
    "not": lambda schema, value: not fits(schema["not"], value),
    "if": _chosen,
    **dict.fromkeys(("then", "else"), lambda schema, value: True),
    "pattern": lambda schema, value: not isinstance(value, str) or re.search(schema["pattern"], value) is not None,
    **dict.fromkeys(
        ("properties", "required", "additionalProperties", "minProperties"),
        lambda schema, value: not isinstance(value, dict) or _object(schema, value),
    ),
    **dict.fromkeys(("items", "minItems"), lambda schema, value: not isinstance(value, list) or _array(schema, value)),
    **dict.fromkeys(
        ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        lambda schema, value: not _is(value, "number") or _number(schema, value),
    ),
}


def fits(schema: Any, value: Any) -> bool:
    """JSON schema's draft 7, as far as ours goes: an unknown keyword is a KeyError."""
    if isinstance(schema, bool):
        return schema
    return all(KEYWORDS[each](schema, value) for each in schema if each not in ABOUT)


def with_change(path: str, value: Any) -> dict[str, Any]:
    """The shipped recipe smoke with one key changed, or taken out (None)."""
    values: Any = parse_file(next(file for file in shipped_recipes() if file.stem == "smoke")).values
    *above, last = path.split(".")
    inner = values
    for key in above:
        inner = inner.setdefault(key, {})
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return values


@pytest.mark.parametrize("file", shipped_recipes(), ids=lambda file: file.stem)
def test_every_shipped_recipe_is_valid(file: Path):
    assert fits(SCHEMA, parse_file(file).values)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("stages.ppo.kl", 0.1),
        ("stages.ppo.reward", {"stage": "reward", "weight": 2}),
        ("stages.ppo.reward", ["reward", {"model": "x/y"}]),
        ("stages.ppo.from", {"adapter": "somewhere"}),
        ("stages.sft.train.learning_rate", "1e-4"),
        ("stages.sft.train.push_to_hub", False),
        ("stages.dpo.loss_type", ["sigmoid", "ipo"]),
        ("stages.dpo.train.beta", 0.2),
        ("stages.mine", {"kind": "mine.py:KIND", "from": "sft", "data": "demos", "anything": 1}),
        ("eval.prompts", "prompts"),
    ],
)
def test_what_the_loader_takes_is_valid(path: str, value: Any):
    assert fits(SCHEMA, with_change(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("modle", {}),
        ("model.base", None),
        ("model.dtype", "fp8"),
        ("lora.r", 0),
        ("data.demos.overflow", "cut"),
        ("stages.sft.train.lr", 1e-4),
        ("stages.sft.train.learning_rate", -1),
        ("stages.sft.train.learning_rate", "fast"),
        ("stages.sft.train.push_to_hub", True),
        ("stages.sft.train.max_steps", 0),
        ("stages.sft.beta", 0.1),
        ("stages.dpo.loss_type", "magic"),
        ("stages.dpo.label_smoothing", 0.5),
        ("stages.ipo.kind", "grpo"),
        ("stages.ipo.kind", None),
        ("stages.ipo.data", None),
        ("stages.ppo.reward", None),
        ("stages.ppo.kl_coef", 0.1),
        ("stages.ppo.kl.beta", 0.1),
        ("stages.ppo.temperature", 0),
        ("eval.temperature", -1),
    ],
)
def test_what_the_loader_refuses_is_not(path: str, value: Any):
    assert not fits(SCHEMA, with_change(path, value))
    if path.partition("train.")[1]:
        return  # its fields are looked at when the recipe is checked against the libraries
    said = "null" if value is None else json.dumps(value)
    with pytest.raises(UserError):
        load_recipe("smoke", [f"{path}={said}"])


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_every_key_of_a_stage_is_there_with_what_it_means(kind):
    stage = SCHEMA["$defs"][f"{kind.name}_stage"]
    keys = {field.alias or name for name, field in stage_model(kind).model_fields.items()}
    assert set(stage["properties"]) == (keys if kind.trains else keys - {"train", "lora", "on_nonfinite"})
    for parameter in kind.alone():
        assert stage["properties"][parameter.name]["description"] == parameter.help
    for group, names in kind.groups.items():
        for key, name in names.items():
            assert (
                SCHEMA["$defs"][f"{kind.name}_{group}"]["properties"][key]["description"] == kind.parameter(name).help
            )
    if not kind.trains:
        return
    train = stage["properties"]["train"]["properties"]
    table = FIELDS[kind.config.rpartition(":")[2]]
    assert set(train) == set(table)
    for name, field in table.items():
        assert train[name]["description"]
        if field is not PARAMETER and field.state == "works" and field.meaning.number:
            assert any(fits(train[name], each) for each in (1, 0.5)) and not fits(train[name], "a word"), name


def test_the_command_prints_it(capsys):
    assert run_command(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(SCHEMA))


def test_the_written_schema_is_this_one():
    assert FILE.read_text(encoding="utf-8") == schema_text() + "\n", "run python -m preftune.recipes.json_schema"


@pytest.mark.parametrize("file", shipped_recipes(), ids=lambda file: file.stem)
def test_a_shipped_recipe_names_the_schema_that_lies_beside_it(file: Path):
    lines = file.read_text(encoding="utf-8").splitlines()
    (named,) = [line for line in lines if line.startswith("# yaml-language-server: $schema=")]
    assert file.with_name(named.partition("=")[2]) == FILE
    # the first line is what `preftune recipes` says of it; an editor reads the comments before the first key
    assert lines.index(named) > 0 and all(line.startswith("#") for line in lines[: lines.index(named)])


def test_another_validator_says_the_same():
    """Where jsonschema is installed."""
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    for file in shipped_recipes():
        assert not list(jsonschema.Draft7Validator(SCHEMA).iter_errors(parse_file(file).values))
