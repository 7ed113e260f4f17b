"""JSON schemas: each word on both sides of its bound, and what is refused."""

from typing import Any

import pytest

from preftune.errors import UserError
from preftune.stages.scorers.json_shape import fits, read_json, validator_of

CASES: list[tuple[Any, Any, Any]] = [
    ({"type": "object"}, {}, []),
    ({"type": ["string", "null"]}, None, 1),
    ({"type": "integer"}, 2.0, 2.5),
    ({"type": "integer"}, 10**400, True),
    ({"type": "number"}, 2.5, True),
    ({"type": "boolean"}, True, 1),
    ({"enum": [1, "a"]}, 1.0, True),
    ({"const": {"a": [1]}}, {"a": [1]}, {"a": [2]}),
    ({"minimum": 1, "maximum": 2}, 2, 2.1),
    ({"exclusiveMinimum": 1}, 1.1, 1),
    ({"exclusiveMaximum": 1}, 0.9, 1),
    ({"multipleOf": 0.1}, 0.3, 0.35),
    ({"multipleOf": 1}, "1", float("inf")),
    ({"multipleOf": 1}, 10**400, 0.5),
    ({"minLength": 1, "maxLength": 2}, "ab", ""),
    ({"pattern": "^a"}, "ab", "ba"),
    ({"required": ["a"]}, {"a": None}, {"b": 1}),
    ({"properties": {"a": {"type": "string"}}}, {"b": 1}, {"a": 1}),
    ({"properties": {"a": {}}, "additionalProperties": False}, {"a": 1}, {"b": 1}),
    ({"additionalProperties": {"type": "number"}}, {"a": 1}, {"a": "1"}),
    ({"minProperties": 1, "maxProperties": 1}, {"a": 1}, {}),
    ({"items": {"type": "number"}}, [1, 2], [1, "2"]),
    ({"minItems": 1, "maxItems": 2}, [1], [1, 2, 3]),
    ({"uniqueItems": True}, [1, True], [1, 1.0]),
    ({"allOf": [{"minimum": 1}, {"maximum": 2}]}, 1, 3),
    ({"anyOf": [{"const": 1}, {"const": 2}]}, 2, 3),
    ({"oneOf": [{"minimum": 1}, {"maximum": 2}]}, 0, 1),
    ({"not": {"const": 1}}, 2, 1),
    ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "null"}}}, None, 0),
    ({"properties": {"next": {"$ref": "#"}}, "required": ["v"]}, {"v": 1, "next": {"v": 2}}, {"v": 1, "next": {}}),
    ({"if": {"type": "string"}, "then": {"minLength": 1}}, "a", ""),
    ({"prefixItems": [{"const": 1}]}, [1, 2], [2]),
    ({"dependentRequired": {"a": ["b"]}}, {"a": 1, "b": 1}, {"a": 1}),
]


@pytest.mark.parametrize(("schema", "good", "bad"), CASES)
def test_each_word_passes_and_fails(schema: Any, good: Any, bad: Any):
    obeys = validator_of(schema, "here")
    assert fits(good, obeys)
    assert not fits(bad, obeys)


def test_a_schema_may_be_true_or_false():
    assert fits(1, validator_of(True, "here")) and not fits(1, validator_of(False, "here"))


@pytest.mark.checklist("W4")
@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ("object", "expected a JSON schema"),
        ({"typ": "object"}, "here.typ: is no word of JSON schemas that is checked here"),
        ({"format": "date"}, "here.format: is no word of JSON schemas that is checked here"),
        ({"if": {"not": {"fromat": 1}}}, "here.if.not.fromat: is no word"),
        ({"type": "dict"}, "here.type: 'dict' is not valid"),
        ({"properties": {"a": {"minimum": "1"}}}, "here.properties.a.minimum: '1' is not of type 'number'"),
        ({"minLength": -1}, "here.minLength: -1 is less than the minimum of 0"),
        ({"multipleOf": 0}, "here.multipleOf: 0 is less than or equal to the minimum of 0"),
        ({"anyOf": []}, "here.anyOf: [] should be non-empty"),
        ({"allOf": [{"pattern": "("}]}, "here.allOf[0].pattern: '(' is not a 'regex'"),
        ({"required": "a"}, "here.required: 'a' is not of type 'array'"),
        ({"items": [{}]}, "here.items: [{}] is not of type 'object', 'boolean'"),
        ({"$ref": "#/$defs/n"}, "here.$ref: is '#/$defs/n', expected a place of this schema"),
        (
            {"properties": {"a": {"$ref": "https://example.org/x"}}},
            "here.properties.a.$ref: is 'https://example.org/x'",
        ),
        ({"uniqueItems": 1}, "here.uniqueItems: 1 is not of type 'boolean'"),
    ],
)
def test_w04_what_is_not_checked_is_refused(schema: Any, said: str):
    with pytest.raises(UserError) as error:
        validator_of(schema, "here")
    assert said in str(error.value)


def test_a_reference_that_leads_to_itself_ends():
    schema = {"$ref": "#"}
    assert not fits(1, validator_of(schema, "here"))


@pytest.mark.checklist("W4")
@pytest.mark.parametrize("text", ["", "{", "NaN", "[Infinity]", '{"a": 1, "a": 2}', "'a'", "[" * 100_000, "1 2"])
def test_w04_what_is_no_json(text: str):
    with pytest.raises(ValueError):
        read_json(text)
