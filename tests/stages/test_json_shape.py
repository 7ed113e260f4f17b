"""JSON schemas: each word on both sides of its bound, what is refused, and the same verdicts as the library's."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.errors import UserError
from preftune.stages.scorers.json_shape import check_schema, fits, read_json

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
    (True, 1, None),
]


@pytest.mark.parametrize(("schema", "good", "bad"), CASES[:-1])
def test_each_word_passes_and_fails(schema: Any, good: Any, bad: Any):
    check_schema(schema, "here")
    assert fits(good, schema)
    assert not fits(bad, schema)


def test_a_schema_may_be_true_or_false():
    assert fits(1, True) and not fits(1, False)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ("object", "expected a JSON schema"),
        ({"typ": "object"}, "did you mean 'type'?"),
        ({"format": "date"}, "here.format: is no word of JSON schemas that is checked here"),
        ({"type": "dict"}, "expected one of object, array"),
        ({"type": [{}]}, "expected one of object, array"),
        ({"properties": {"a": {"minimum": "1"}}}, "here.properties.a.minimum: is '1', expected a number"),
        ({"minLength": -1}, "expected a whole number from 0"),
        ({"multipleOf": 0}, "expected a number above 0"),
        ({"anyOf": []}, "expected a list"),
        ({"allOf": [{"pattern": "("}]}, "here.allOf[0].pattern"),
        ({"required": "a"}, "expected a list of names"),
        ({"items": [{}]}, "expected a JSON schema"),
        ({"$ref": "#/$defs/n"}, "expected a place such as"),
        ({"$ref": "https://example.org/x"}, "expected a place such as"),
        ({"uniqueItems": 1}, "expected true or false"),
    ],
)
def test_what_is_not_checked_is_refused(schema: Any, said: str):
    with pytest.raises(UserError) as error:
        check_schema(schema, "here")
    assert said in str(error.value)


def test_a_reference_that_leads_to_itself_ends():
    schema = {"$ref": "#"}
    check_schema(schema, "here")
    assert not fits(1, schema)


@pytest.mark.parametrize("text", ["", "{", "NaN", "[Infinity]", '{"a": 1, "a": 2}', "'a'", "[" * 100_000, "1 2"])
def test_what_is_no_json(text: str):
    with pytest.raises(ValueError):
        read_json(text)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(-3, 3).map(lambda x: round(x, 1))
    | st.text("ab", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abv"), inner, max_size=3),
    max_leaves=6,
)


@given(VALUES, st.sampled_from([schema for schema, _, _ in CASES]))
def test_verdicts_are_the_librarys(value: Any, schema: Any):
    """Where jsonschema is installed."""
    jsonschema = pytest.importorskip("jsonschema")
    if isinstance(schema, dict) and "multipleOf" in schema:
        return  # the library divides floats
    assert fits(value, schema) == jsonschema.Draft202012Validator(schema).is_valid(value)
