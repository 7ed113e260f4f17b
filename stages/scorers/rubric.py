"""A rubric: checks on a reply that anybody can read in the recipe and repeat by hand.

A check is `{name, kind, ...}` with the fields of its kind:

| kind | fields | passes when |
|---|---|---|
| max_words, min_words | value | the reply has at most / at least that many words (split at white space) |
| contains_any, contains_all, excludes_any | values | any / all / none of the strings is in it, case ignored |
| regex | pattern | `re.search` finds the pattern |
| ends_with | values | it ends in one of the strings, white space at its end aside |
| sentence_count | min, max (one or both) | the number of sentences is within the bounds |

The score of a reply is the share of checks that it passes. In a recipe, `checks` may also name a YAML file with such a
list.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from ...errors import UserError, nearest
from ...patience import bounded

Predicate = Callable[[str], bool]
_PATIENCE = 5.0
"""Seconds for one pattern on one reply: a good one needs a thousandth of one."""
_ALMOST = 400
"""So many times a character that the pattern speaks of: as long as a reply of a hundred tokens."""
# without a way back, and begun where such marks begin: the time is linear in the text, whatever it is
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]]*+(?=\s|$)|\n++")


@dataclass(frozen=True)
class Check:
    """One check: `passes(text)` says whether the reply obeys it."""

    name: str
    kind: str
    passes: Predicate
    pattern: str = ""

    def try_out(self) -> None:
        """Try a pattern on texts that almost fit: repeats within repeats show there.

        Raises:
            UserError: it takes too long on one of them.
        """
        for character in sorted({*"a ", *filter(str.isalnum, self.pattern)}) if self.pattern else ():
            self.passes(character * _ALMOST + "\0")


@dataclass(frozen=True)
class Rubric:
    """Checks that count alike."""

    checks: tuple[Check, ...]

    def results(self, text: str) -> dict[str, bool]:
        """Which checks the reply passes, by name, in the recipe's order."""
        return {check.name: check.passes(text) for check in self.checks}

    def try_out(self) -> None:
        """Raises UserError where a pattern takes too long on a text that almost fits."""
        for check in self.checks:
            check.try_out()

    def score(self, text: str) -> float:
        """The share of checks that the reply passes, in [0, 1]."""
        return sum(self.results(text).values()) / len(self.checks)


def count_words(text: str) -> int:
    """Words as a word processor counts them: runs without white space."""
    return len(text.split())


def count_sentences(text: str) -> int:
    """Pieces with a word in them between sentence marks or line ends (`e.g.` before a blank is taken for an end)."""
    return sum(1 for piece in _SENTENCE_END.split(text) if re.search(r"\w", piece))


def parse_rubric(raw: Any, where: str) -> Rubric:
    """Builds a rubric from a recipe's list of checks.

    Raises:
        UserError: for a malformed check, naming it by its place in the list.
    """
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        raise UserError(where, f"checks is {raw!r}, expected a list of checks", "list at least one {name, kind, ...}")
    checks = tuple(_parse_check(entry, f"{where}.checks[{place}]") for place, entry in enumerate(raw))
    names = [check.name for check in checks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(where, f"two checks are called {twice!r}", "give each check its own name")
    return Rubric(checks)


def _parse_check(entry: Any, where: str) -> Check:
    if not isinstance(entry, Mapping):
        raise UserError(where, f"is {entry!r}, expected a mapping", "write {name, kind, ...}")
    kind = entry.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UserError(where, f"kind is {kind!r}, expected one of {', '.join(_KINDS)}", nearest(str(kind), _KINDS))
    required, build = _KINDS[kind]
    allowed = {"name", "kind", *required}
    for key in entry:
        if key not in allowed:
            raise UserError(where, f"{kind} takes no {key!r}", nearest(str(key), sorted(allowed)))
    fields = {key: entry[key] for key in required if entry.get(key) is not None}
    if not fields:
        raise UserError(where, f"{kind} without {' or '.join(required)}", f"give {' or '.join(required)}")
    return Check(str(entry.get("name") or kind), kind, build(fields, where), str(fields.get("pattern", "")))


def _number(fields: Mapping[str, Any], key: str, where: str) -> int:
    value = fields[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"{where}.{key}", f"is {value!r}, expected a whole number from 0", "write a number such as 60")
    return value


def _strings(fields: Mapping[str, Any], where: str) -> tuple[str, ...]:
    values = fields["values"]
    good = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    if not good or not all(isinstance(value, str) and value for value in values):
        raise UserError(f"{where}.values", f"is {values!r}, expected a list of strings", 'write values: ["..."]')
    return tuple(values)


def _max_words(fields: Mapping[str, Any], where: str) -> Predicate:
    limit = _number(fields, "value", where)
    return lambda text: count_words(text) <= limit


def _min_words(fields: Mapping[str, Any], where: str) -> Predicate:
    limit = _number(fields, "value", where)
    return lambda text: count_words(text) >= limit


def _contains(combine: Callable[..., bool]) -> Callable[[Mapping[str, Any], str], Predicate]:
    def build(fields: Mapping[str, Any], where: str) -> Predicate:
        wanted = tuple(value.casefold() for value in _strings(fields, where))

        def passes(text: str) -> bool:
            folded = text.casefold()
            return combine(value in folded for value in wanted)

        return passes

    return build


def _none(found: Any) -> bool:
    return not any(found)


def _regex(fields: Mapping[str, Any], where: str) -> Predicate:
    pattern = parse_pattern(fields["pattern"], f"{where}.pattern")
    return lambda text: pattern.search(text) is not None


class Pattern:
    """A regular expression that gives up on a text after a while."""

    def __init__(self, compiled: Any, written: str, where: str) -> None:
        self._compiled, self._written, self._where = compiled, written, where
        self.groups: int = compiled.groups

    def search(self, text: str) -> Any:
        """As `re.search`. Raises UserError where that takes too long."""
        return self._found(self._compiled.search, text)

    def fullmatch(self, text: str) -> Any:
        """As `re.fullmatch`. Raises UserError where that takes too long."""
        return self._found(self._compiled.fullmatch, text)

    def _found(self, look: Callable[..., Any], text: str) -> Any:
        try:
            return look(text, timeout=_PATIENCE)
        except TimeoutError:
            said = f"{self._written!r} takes more than {_PATIENCE:g} s on one reply (repeats within repeats)"
            raise UserError(self._where, said, "write it without one quantifier inside another") from None


def parse_pattern(pattern: Any, where: str) -> Pattern:
    """Raises UserError for what is no regular expression, or takes too long to compile."""
    try:
        compiled = bounded(lambda: _compiled(pattern), _PATIENCE, where, "the pattern", "write a shorter one")
    except (re.error, regex.error, TypeError, OverflowError, RecursionError) as error:
        raise UserError(where, f"{pattern!r} is no regular expression ({error})", "correct the pattern") from None
    return Pattern(compiled, pattern, where)


def _compiled(pattern: Any) -> Any:
    """re says what a pattern means; regex, which reads the same patterns, can give up on one."""
    re.compile(pattern)
    return regex.compile(pattern)


def _ends_with(fields: Mapping[str, Any], where: str) -> Predicate:
    endings = _strings(fields, where)
    return lambda text: text.rstrip().endswith(endings)


def _sentence_count(fields: Mapping[str, Any], where: str) -> Predicate:
    low = _number(fields, "min", where) if "min" in fields else 0
    high = _number(fields, "max", where) if "max" in fields else None
    if high is not None and high < low:
        raise UserError(where, f"min {low} is above max {high}", "exchange them")
    return lambda text: low <= count_sentences(text) and (high is None or count_sentences(text) <= high)


_KINDS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any], str], Predicate]]] = {
    "max_words": (("value",), _max_words),
    "min_words": (("value",), _min_words),
    "contains_any": (("values",), _contains(any)),
    "contains_all": (("values",), _contains(all)),
    "excludes_any": (("values",), _contains(_none)),
    "regex": (("pattern",), _regex),
    "ends_with": (("values",), _ends_with),
    "sentence_count": (("min", "max"), _sentence_count),
}
