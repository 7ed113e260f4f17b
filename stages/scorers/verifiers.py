"""Verifiers: checks of a reply that need no model, most of them against a column of the data. 1 is right, 0 is wrong.

    - {kind: verifier, check: numeric, column: answer}

| check | fields | right when |
|---|---|---|
| exact | column or value, extract, ignore_case, ignore_punctuation | the answer is that text, or one of a list |
| numeric | column or value, extract, tolerance, relative_tolerance, percent, decimal | the answer is that number |
| regex | pattern, full, column | the pattern is found; with a column, its first group is what the column says |
| json | schema, fenced | the reply is JSON, and obeys the schema |
| length | unit, min, max | so many words, characters or tokens |
| starts_with, ends_with | values, ignore_case | it begins, ends in one of them |
| contains, excludes | values, ignore_case | each, none of them is in it |
| no_code | | it has no code block |
| tags | tags | it is `<think>...</think><answer>...</answer>`, say: each once, in that order, nothing beside them |

`extract` says where in a reply the answer stands: the first of several places that the reply has (`answers.PLACES`).
What was thought (`<think>`) is no part of it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ...errors import UserError, nearest
from ...patience import bounded
from ...values import is_finite, is_number
from .answers import PLACES, after_hash, answer_in, boxed, read_number
from .json_shape import fits, read_json, validator_of
from .replies import Failures, OnFailure, Replies
from .rubric import count_words, parse_pattern

Row = Mapping[str, object]
Verdict = Callable[[str, Row, int], bool]
"""(reply, columns of its row, its tokens) -> whether it is right. Raises Unusable where the row does not say."""

EXTRACT = {"exact": ("boxed", "hash", "answer", "all"), "numeric": ("boxed", "hash", "answer", "last_number")}
"""Where an answer is looked for, unless the recipe says so."""
_UNITS = ("words", "characters", "tokens")
_FENCE = re.compile(r"\s*```[\w-]*[ \t]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL)
_CODE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
_TRY_OUT = 400


class Unusable(Exception):
    """A row of the data does not say what a reply is to be compared with."""


@dataclass(frozen=True)
class Verifier:
    """A check that a recipe asks for.

    Attributes:
        check: its name.
        column: the column that replies are compared with; None: they are compared with none.
        verdict: see `Verdict`.
        reference: reads what a row says, raises Unusable where it is of no use.
        pattern: the regular expression, for `try_out`.
    """

    check: str
    verdict: Verdict
    column: str | None = None
    reference: Callable[[object], Any] | None = None
    pattern: str = ""

    def check_row(self, row: Row) -> None:
        """Raises Unusable where replies to this row's prompt could not be compared with it."""
        if self.column is not None and self.reference is not None:
            self.reference(_of_column(row, self.column))

    def try_out(self) -> None:
        """Raises UserError where the pattern takes too long on a text that almost fits."""
        for character in sorted({*"a ", *filter(str.isalnum, self.pattern)}) if self.pattern else ():
            self.verdict(character * _TRY_OUT + "\0", {self.column or "": "a"}, _TRY_OUT)


@dataclass(frozen=True)
class VerifierScorer:
    """A verifier as a source of scores."""

    verifier: Verifier
    failures: Failures

    @classmethod
    def of(cls, verifier: Verifier, where: str, on_failure: OnFailure) -> "VerifierScorer":
        return cls(verifier, Failures(where, on_failure))

    def __call__(self, replies: Replies) -> list[float]:
        scores, why = [0.0] * len(replies), dict[int, str]()
        for place, text in enumerate(replies.texts):
            tokens = len(replies.reply_ids[place]) if len(replies.reply_ids) else 0
            try:
                scores[place] = float(self.verifier.verdict(text, replies.row(place), tokens))
            except Unusable as error:
                why[place] = str(error)
        return self.failures.settled(replies, scores, why, "correct the data, or say on_failure")


def parse_verifier(entry: Mapping[str, Any], where: str) -> Verifier:
    """From a recipe's entry: `check`, and the fields of that check.

    Raises:
        UserError: an unknown check, a field that it does not take, lacks, or cannot use.
    """
    check = entry.get("check")
    if not isinstance(check, str) or check not in CHECKS:
        known = list(CHECKS)
        said = "is missing" if check is None else f"is {check!r}"
        remedy = nearest(check, known) if isinstance(check, str) else "write check: numeric, say"
        raise UserError(f"{where}.check", f"{said}, expected one of {', '.join(known)}", remedy)
    fields, build = CHECKS[check]
    for key in entry:
        if key not in ("check", *fields):
            remedy = nearest(str(key), fields) if fields else "leave it out"
            raise UserError(f"{where}.{key}", f"check: {check} takes none", remedy)
    return build(check, dict(entry), where)


def _exact(check: str, entry: dict[str, Any], where: str) -> Verifier:
    case, marks = _flag(entry, "ignore_case", where), _flag(entry, "ignore_punctuation", where)
    places = _places(check, entry, where)

    def plain(text: str) -> str:
        text = " ".join((re.sub(r"[^\w\s]", "", text) if marks else text).split())
        return text.casefold() if case else text

    def reference(value: object) -> set[str]:
        return {plain(_answer_of(each)) for each in _several(value)}

    def right(answer: str, wanted: Any) -> bool:
        return plain(answer) in wanted

    return _compared(check, entry, where, places, reference, right)


def _numeric(check: str, entry: dict[str, Any], where: str) -> Verifier:
    absolute, relative = (_share(entry, key, where) for key in ("tolerance", "relative_tolerance"))
    percent, decimal = _flag(entry, "percent", where), entry.get("decimal", ".")
    if decimal not in (".", ","):
        raise UserError(f"{where}.decimal", f"is {decimal!r}, expected '.' or ','", "correct it, or leave it out")
    places = _places(check, entry, where)

    def reference(value: object) -> list[Fraction]:
        return [_number_of(each, decimal, percent) for each in _several(value)]

    def right(answer: str, wanted: Any) -> bool:
        found = read_number(answer, decimal=decimal, percent=percent)
        return found is not None and any(abs(found - each) <= max(absolute, relative * abs(each)) for each in wanted)

    return _compared(check, entry, where, places, reference, right)


def _compared(
    check: str,
    entry: dict[str, Any],
    where: str,
    places: tuple[str, ...],
    reference: Callable[[object], Any],
    right: Callable[[str, Any], bool],
) -> Verifier:
    """A verifier that compares a reply's answer with a column, or with one value for all rows."""
    column = _column(entry, where)
    if (column is None) == (entry.get("value") is None):
        said = "column and value stand side by side" if column else "nothing is named that replies are compared with"
        raise UserError(where, said, "write column: answer, say, or value: ... for all rows")
    fixed = None
    if column is None:
        try:
            fixed = reference(entry["value"])
        except Unusable as error:
            raise UserError(f"{where}.value", str(error), "correct it") from None

    def verdict(text: str, row: Row, tokens: int) -> bool:
        del tokens
        wanted = fixed if column is None else reference(_of_column(row, column))
        answer = answer_in(text, places)
        return answer is not None and right(answer, wanted)

    return Verifier(check, verdict, column, reference)


def _regex(check: str, entry: dict[str, Any], where: str) -> Verifier:
    pattern, column = parse_pattern(entry.get("pattern"), f"{where}.pattern"), _column(entry, where)
    search = pattern.fullmatch if _flag(entry, "full", where) else pattern.search
    if column is not None and pattern.groups == 0:
        said = "has no group, and its first group is what is compared with the column"
        raise UserError(f"{where}.pattern", said, "put round brackets around the answer")

    def reference(value: object) -> set[str]:
        return {_text_of(each).strip() for each in _several(value)}

    def verdict(text: str, row: Row, tokens: int) -> bool:
        del tokens
        wanted = None if column is None else reference(_of_column(row, column))
        found = search(text)
        return found is not None and (wanted is None or (found[1] or "").strip() in wanted)

    return Verifier(check, verdict, column, reference, str(entry["pattern"]))


def _json(check: str, entry: dict[str, Any], where: str) -> Verifier:
    schema, fenced = entry.get("schema", True), _flag(entry, "fenced", where, default=True)
    validator = validator_of(schema, f"{where}.schema")

    def verdict(text: str, row: Row, tokens: int) -> bool:
        del row, tokens
        found = _FENCE.fullmatch(text) if fenced else None
        try:
            value = read_json(text if found is None else found[1])
        except ValueError:
            return False
        return bounded(lambda: fits(value, validator), 5.0, f"{where}.schema", "the schema", "write a simpler one")

    return Verifier(check, verdict)


def _length(check: str, entry: dict[str, Any], where: str) -> Verifier:
    unit = entry.get("unit", "words")
    if unit not in _UNITS:
        remedy = nearest(unit, _UNITS) if isinstance(unit, str) else "correct it"
        raise UserError(f"{where}.unit", f"is {unit!r}, expected one of {', '.join(_UNITS)}", remedy)
    low, high = (_count(entry, key, where) for key in ("min", "max"))
    if low is None and high is None:
        raise UserError(where, "check: length without min or max", "give one of them, or both")
    if low is not None and high is not None and high < low:
        raise UserError(where, f"min {low} is above max {high}", "exchange them")

    def verdict(text: str, row: Row, tokens: int) -> bool:
        del row
        length = {"words": count_words, "characters": len}[unit](text) if unit != "tokens" else tokens
        return (low is None or length >= low) and (high is None or length <= high)

    return Verifier(check, verdict)


def _affix(check: str, entry: dict[str, Any], where: str) -> Verifier:
    folded, values = _values(entry, where)

    def verdict(text: str, row: Row, tokens: int) -> bool:
        del row, tokens
        said = folded(text.strip())
        return said.startswith(values) if check == "starts_with" else said.endswith(values)

    return Verifier(check, verdict)


def _contains(check: str, entry: dict[str, Any], where: str) -> Verifier:
    folded, values = _values(entry, where)

    def verdict(text: str, row: Row, tokens: int) -> bool:
        del row, tokens
        found = [value in folded(text) for value in values]
        return all(found) if check == "contains" else not any(found)

    return Verifier(check, verdict)


def _no_code(check: str, entry: dict[str, Any], where: str) -> Verifier:
    del entry, where
    return Verifier(check, lambda text, row, tokens: _CODE.search(text) is None)


def _tags(check: str, entry: dict[str, Any], where: str) -> Verifier:
    names = entry.get("tags", ["think", "answer"])
    good = isinstance(names, Sequence) and not isinstance(names, str) and len(names) > 0
    if not good or not all(isinstance(each, str) and re.fullmatch(r"[\w-]+", each) for each in names):
        raise UserError(f"{where}.tags", f"is {names!r}, expected a list of names", "write tags: [think, answer]")
    if len(set(names)) < len(names):
        raise UserError(f"{where}.tags", f"is {names!r}, and each stands once in a reply", "name each once")
    marks = [mark for name in names for mark in (f"<{name}>", f"</{name}>")]

    def verdict(text: str, row: Row, tokens: int) -> bool:
        del row, tokens
        if any(text.count(mark) != 1 for mark in marks):
            return False
        places = [text.index(mark) for mark in marks]
        if places != sorted(places):
            return False
        ends = [0, *(place + len(mark) for place, mark in zip(places, marks, strict=True))][::2]
        outside = [text[end:start] for end, start in zip(ends, [*places[::2], len(text)], strict=True)]
        return not "".join(outside).strip()

    return Verifier(check, verdict)


CHECKS: dict[str, tuple[tuple[str, ...], Callable[[str, dict[str, Any], str], Verifier]]] = {
    "exact": (("column", "value", "extract", "ignore_case", "ignore_punctuation"), _exact),
    "numeric": (
        ("column", "value", "extract", "tolerance", "relative_tolerance", "percent", "decimal"),
        _numeric,
    ),
    "regex": (("pattern", "full", "column"), _regex),
    "json": (("schema", "fenced"), _json),
    "length": (("unit", "min", "max"), _length),
    "starts_with": (("values", "ignore_case"), _affix),
    "ends_with": (("values", "ignore_case"), _affix),
    "contains": (("values", "ignore_case"), _contains),
    "excludes": (("values", "ignore_case"), _contains),
    "no_code": ((), _no_code),
    "tags": (("tags",), _tags),
}
"""The name of a check -> its fields, and what makes a verifier of them."""


def _of_column(row: Row, column: str) -> object:
    value = row.get(column)
    if value is None:
        raise Unusable(f"its row has no {column!r}")
    return value


def _several(value: object) -> Sequence[object]:
    """A list of answers of which each is right, or one."""
    several = value if isinstance(value, list | tuple) else [value]
    if not several:
        raise Unusable("the list of answers is empty")
    return several


def _text_of(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Unusable(f"the answer to compare with is {str(value)[:40]!r}, expected text or a number")
    return str(value)


def _answer_of(value: object) -> str:
    """The data's answer: behind `####` or in a box, where it is written like that; else all of it."""
    text = _text_of(value)
    for place in (after_hash, boxed):
        if (found := place(text)) is not None:
            return found
    return text


def _number_of(value: object, decimal: str, percent: bool) -> Fraction:
    if is_number(value) and (isinstance(value, int) or is_finite(value)):
        return Fraction(value) if isinstance(value, int) else Fraction(repr(value))
    found = read_number(_answer_of(value), decimal=decimal, percent=percent)
    if found is None:
        raise Unusable(f"the answer to compare with is {_answer_of(value)[:40]!r}, expected a number")
    return found


def _places(check: str, entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
    named: Any = entry.get("extract", EXTRACT[check])
    several = [named] if isinstance(named, str) else list(named) if isinstance(named, list | tuple) else []
    wrong = next((str(each) for each in several if each not in PLACES), None)
    if wrong is not None or not several:
        said = f"is {named!r}, expected some of {', '.join(PLACES)}"
        raise UserError(f"{where}.extract", said, nearest(wrong or "", PLACES))
    return tuple(several)


def _column(entry: Mapping[str, Any], where: str) -> str | None:
    column = entry.get("column")
    if column is not None and (not isinstance(column, str) or not column):
        raise UserError(f"{where}.column", f"is {column!r}, expected a column's name", "write column: answer, say")
    return column


def _flag(entry: Mapping[str, Any], key: str, where: str, *, default: bool = False) -> bool:
    value = entry.get(key, default)
    if not isinstance(value, bool):
        raise UserError(f"{where}.{key}", f"is {value!r}, expected true or false", "correct it, or leave it out")
    return value


def _share(entry: Mapping[str, Any], key: str, where: str) -> Fraction:
    value = entry.get(key, 0)
    if not is_finite(value) or value < 0:
        raise UserError(f"{where}.{key}", f"is {value!r}, expected a number from 0", "correct it, or leave it out")
    return Fraction(repr(value))


def _count(entry: Mapping[str, Any], key: str, where: str) -> int | None:
    value = entry.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise UserError(f"{where}.{key}", f"is {value!r}, expected a whole number from 0", "write a number such as 60")
    return value


def _values(entry: Mapping[str, Any], where: str) -> tuple[Callable[[str], str], tuple[str, ...]]:
    """How texts are compared, and the texts to look for in that form."""
    values: Any = entry.get("values")
    good = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    if not good or not all(isinstance(each, str) and each for each in values):
        raise UserError(f"{where}.values", f"is {values!r}, expected a list of texts", 'write values: ["..."]')
    fold = str.casefold if _flag(entry, "ignore_case", where) else str
    return fold, tuple(fold(each) for each in values)
