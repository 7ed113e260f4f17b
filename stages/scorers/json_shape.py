"""JSON that a reply is, and the schema (draft 2020-12, by jsonschema) that it obeys.

A word that the library does not check is refused when the schema is read: a rule that is passed over would let
everything through.
"""

import functools
import json
import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ...errors import UserError, nearest
from ...values import is_number

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

_SAYS_NOTHING = ("$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated")
_PARTS = ("then", "else", "minContains", "maxContains")
"""Words that `if` and `contains` read."""
_MAPS = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = (
    *("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"),
    *("unevaluatedItems", "unevaluatedProperties"),
)
"""Where a schema holds others: by name, in a list, alone."""


def validator_of(schema: Any, where: str) -> "Validator":
    """What says of a value whether it obeys the schema (`fits`).

    Raises:
        UserError: a word that is not checked, a value that no schema has there, or a reference that leads out of the
            schema: nothing is fetched.
    """
    from jsonschema import SchemaError

    if not isinstance(schema, bool | Mapping):
        said = f"is {str(schema)[:60]!r}, expected a JSON schema"
        raise UserError(where, said, "write a mapping such as {type: object}")
    validator = _exact()
    try:
        validator.check_schema(schema, format_checker=validator.FORMAT_CHECKER)
    except SchemaError as error:
        place = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in error.absolute_path)
        raise UserError(f"{where}{place}", error.message[:200], "correct the schema") from None
    words = (*validator.VALIDATORS, *_SAYS_NOTHING, *_PARTS, *_MAPS)
    known = {word for word in words if word != "format"}  # which the library only reads where others are installed
    for place, each in _schemas(schema, where):
        for key in each:
            if key not in known:
                remedy = nearest(str(key), sorted(known), most=12)
                raise UserError(f"{place}.{key}", "is no word of JSON schemas that is checked here", remedy)
        if "$ref" in each:
            _check_reference(schema, str(each["$ref"]), f"{place}.$ref")
    return validator(schema)


def fits(value: Any, validator: "Validator") -> bool:
    """Whether a value that came from JSON obeys the schema; nothing obeys one that only leads back to itself."""
    try:
        return validator.is_valid(value)
    except RecursionError:
        return False


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


@functools.cache
def _exact() -> Any:
    """The library's validator, but that 0.3 is a multiple of 0.1: it divides floats."""
    from jsonschema import Draft202012Validator, ValidationError, validators

    def multiple_of(_: Any, step: float, value: Any, __: Any) -> Iterator[ValidationError]:
        if not is_number(value):
            return
        # 1e400 in a reply is read as infinity
        if abs(value) == math.inf or (Fraction(repr(value)) / Fraction(repr(step))).denominator != 1:
            yield ValidationError(f"{value} is no multiple of {step}")

    return validators.extend(Draft202012Validator, {"multipleOf": multiple_of})


def _schemas(schema: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The schema and those within it, each with its place."""
    if not isinstance(schema, Mapping):
        return
    yield place, schema
    for key in _MAPS:
        for name, each in schema.get(key, {}).items():
            yield from _schemas(each, f"{place}.{key}.{name}")
    for key in _LISTS:
        for i, each in enumerate(schema.get(key, ())):
            yield from _schemas(each, f"{place}.{key}[{i}]")
    for key in _SINGLE:
        yield from _schemas(schema.get(key), f"{place}.{key}")


def _check_reference(schema: Any, reference: str, place: str) -> None:
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    base = str(schema.get("$id", ""))
    registry: Any = Registry().with_resource(base, DRAFT202012.create_resource(schema))
    try:
        if not reference.startswith("#"):
            raise Unresolvable(ref=reference)
        registry.resolver(base).lookup(reference)
    except Unresolvable:
        said = f"is {reference[:60]!r}, expected a place of this schema such as #/$defs/NAME"
        raise UserError(place, said, "correct the schema") from None
