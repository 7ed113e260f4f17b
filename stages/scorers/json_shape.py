"""JSON schemas, as much of them as a reply is checked with (the words of draft 2020-12 that are listed below).

A word that is not listed is refused when the schema is read: a rule that is passed over would let everything through.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from ...errors import UserError, nearest
from ...values import is_finite, is_number

_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": is_number,
    "integer": lambda value: is_number(value) and (isinstance(value, int) or value.is_integer()),
}
_SAYS_NOTHING = ("$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_ALL = ("allOf", "anyOf", "oneOf")
_NAMED = ("$defs", "definitions")
_WORDS = (
    *("type", "enum", "const", "properties", "required", "additionalProperties", "items", "uniqueItems", "pattern"),
    *("multipleOf", "not", "$ref", *_NAMED, *_COUNTS, *_BOUNDS, *_ALL, *_SAYS_NOTHING),
)
_DEEPEST = 100


def check_schema(schema: Any, where: str) -> None:
    """Look through a schema.

    Raises:
        UserError: a word that is none of ours, or a value that no schema has there.
    """
    _check(schema, where, schema)


def fits(value: Any, schema: Any) -> bool:
    """Whether a value that came from JSON obeys a schema that `check_schema` took."""
    return _fits(value, schema, schema, 0)


def read_json(text: str) -> Any:
    """The value that the text is. NaN and infinities, and a key that an object has twice, are no JSON here.

    Raises:
        ValueError: the text is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in an object")
    return found


def _check(schema: Any, where: str, root: Any) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise UserError(
            where, f"is {str(schema)[:60]!r}, expected a JSON schema", "write a mapping such as {type: object}"
        )
    for key, value in schema.items():
        here = f"{where}.{key}"
        if key not in _WORDS:
            raise UserError(here, "is no word of JSON schemas that is checked here", nearest(str(key), _WORDS, most=12))
        if (wrong := _wrong(key, value, root)) is not None:
            raise UserError(here, f"is {str(value)[:60]!r}, expected {wrong}", "correct the schema")
        if key in ("properties", *_NAMED):
            for name, each in value.items():
                _check(each, f"{here}.{name}", root)
        elif key in _ALL:
            for place, each in enumerate(value):
                _check(each, f"{here}[{place}]", root)
        elif key in ("items", "additionalProperties", "not"):
            _check(value, here, root)


def _wrong(key: str, value: Any, root: Any) -> str | None:
    """What the word takes, where this is something else."""
    if key == "$ref":
        return None if isinstance(value, str) and _target(value, root) is not None else "a place such as #/$defs/NAME"
    good, words = _TAKES.get(key, (lambda value: True, ""))
    return None if good(value) else words


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_types(value: Any) -> bool:
    named = value if _is_list(value) else [value]
    return bool(named) and all(isinstance(each, str) and each in _TYPES for each in named)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


_TAKES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "type": (_are_types, f"one of {', '.join(_TYPES)}, or a list of them"),
    **dict.fromkeys(_COUNTS, (_is_count, "a whole number from 0")),
    **dict.fromkeys(_BOUNDS, (is_number, "a number")),
    "multipleOf": (lambda value: is_finite(value) and value > 0, "a number above 0"),
    **dict.fromkeys(("properties", *_NAMED), (lambda value: isinstance(value, Mapping), "a mapping")),
    "required": (lambda value: _is_list(value) and all(isinstance(each, str) for each in value), "a list of names"),
    **dict.fromkeys(("enum", *_ALL), (lambda value: _is_list(value) and len(value) > 0, "a list")),
    "uniqueItems": (lambda value: isinstance(value, bool), "true or false"),
    "pattern": (lambda value: isinstance(value, str) and _compiles(value), "a regular expression"),
}
"""A word -> what it takes, as a test and in words."""


def _target(place: str, root: Any) -> Any:
    """What a reference within the schema means: the whole of it, or one of its named parts; None for another place."""
    if place == "#":
        return root
    for part in _NAMED:
        if place.startswith(f"#/{part}/") and isinstance(named := root.get(part), Mapping):
            return named.get(place.removeprefix(f"#/{part}/").replace("~1", "/").replace("~0", "~"))
    return None


def _fits(value: Any, schema: Any, root: Any, depth: int) -> bool:
    if isinstance(schema, bool):
        return schema
    if depth > _DEEPEST:  # a reference that leads to itself, or a value beyond all measure
        return False
    return (
        _fits_plainly(value, schema)
        and (not isinstance(value, dict) or _fits_object(value, schema, root, depth + 1))
        and (not isinstance(value, list) or _fits_array(value, schema, root, depth + 1))
        and _fits_all(value, schema, root, depth + 1)
    )


def _fits_plainly(value: Any, schema: Mapping[str, Any]) -> bool:
    """What is said of the value itself: type, choice, text, bounds."""
    named = schema.get("type")
    if named is not None and not any(_TYPES[each](value) for each in ([named] if isinstance(named, str) else named)):
        return False
    if "enum" in schema and not any(_equal(value, each) for each in schema["enum"]):
        return False
    if "const" in schema and not _equal(value, schema["const"]):
        return False
    if isinstance(value, str):
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", math.inf):
            return False
        if "pattern" in schema and re.search(schema["pattern"], value) is None:
            return False
    return not is_number(value) or _within(value, schema)


def _within(value: float, schema: Mapping[str, Any]) -> bool:
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    above, below = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
    step = schema.get("multipleOf")
    exact = step is None or (_is_bounded(value) and (Fraction(repr(value)) / Fraction(repr(step))).denominator == 1)
    return (
        low <= value <= high
        and (above < value or above == -math.inf)
        and (value < below or below == math.inf)
        and exact
    )


def _is_bounded(value: float) -> bool:
    return isinstance(value, int) or math.isfinite(value)


def _fits_object(value: dict[str, Any], schema: Mapping[str, Any], root: Any, depth: int) -> bool:
    if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", math.inf):
        return False
    if not set(schema.get("required", ())) <= value.keys():
        return False
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    return all(_fits(each, known.get(name, others), root, depth) for name, each in value.items())


def _fits_array(value: list[Any], schema: Mapping[str, Any], root: Any, depth: int) -> bool:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf):
        return False
    if schema.get("uniqueItems") and any(_equal(one, two) for i, one in enumerate(value) for two in value[:i]):
        return False
    return all(_fits(each, schema.get("items", True), root, depth) for each in value)


def _fits_all(value: Any, schema: Mapping[str, Any], root: Any, depth: int) -> bool:
    """The words that join schemas."""
    matching = {word: sum(_fits(value, each, root, depth) for each in schema.get(word, ())) for word in _ALL}
    return (
        matching["allOf"] == len(schema.get("allOf", ()))
        and (matching["anyOf"] > 0 or "anyOf" not in schema)
        and (matching["oneOf"] == 1 or "oneOf" not in schema)
        and ("not" not in schema or not _fits(value, schema["not"], root, depth))
        and ("$ref" not in schema or _fits(value, _target(schema["$ref"], root), root, depth))
    )


def _equal(one: Any, two: Any) -> bool:
    """As JSON has it: true is not 1, and 1.0 is."""
    if isinstance(one, bool) or isinstance(two, bool):
        return one is two
    if isinstance(one, dict) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(_equal(one[key], two[key]) for key in one)
    if isinstance(one, list) and isinstance(two, Sequence) and not isinstance(two, str):
        return len(one) == len(two) and all(map(_equal, one, two))
    return one == two
