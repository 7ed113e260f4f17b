"""The answer that a reply gives, and the number that a text writes.

Numbers are exact fractions, and nothing is guessed: what could be read in two ways is no number. Read are `12`, `-3.5`,
`.5`, `1,234,567`, `1 234` (narrow or no-break space), `1'234`, `3/4`, `1 3/4`, `6.02e23`, `3 x 10^8`, `5 million`,
`$12`, `12%`, and LaTeX's `\\frac{3}{4}`, `1{,}234`, `\\text{...}` behind a number. Not read are `3,5` and `1,2,3` (no
thousands), `12:30`, `1/2/2024`, `1.2.3`, `5k`, `2x`, `2\\pi`, `2^10`, `1/0`, more than 300 digits.
"""

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import cache
from types import MappingProxyType

_LONGEST = 300
"""Digits, and the power of ten: beyond it nobody's answer lies, and powers would fill the memory."""

_THIN = "\u00a0\u2009\u202f"
_CURRENCY = "$€£¥"
_POWERS = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NO_UNITS = frozenset(("pi", "e", "i", *_POWERS))
"""Words behind a number that change it."""

_HASH = re.compile(r"####[ \t]*([^\n]*)")
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}\s*\{([^{}]*)\}|([0-9])\s*([0-9]))")
_LATEX = (
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\\sqrt\s*"), "√"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,!;:]"), ""),
    (re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[()\[\]]"), ""),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\(?:times|cdot)(?![a-zA-Z])"), "×"),
)
_VULGAR = {
    "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5",
    "⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8",
}  # fmt: skip
_ONE_SIGN = re.compile(f"[{''.join(_VULGAR)}]")
_SPELLINGS = str.maketrans({"−": "-", "–": "-", "⁄": "/"})

# a sign counts where it is no minus between two terms; what runs on behind a digit is one number, or none
_LIKE = re.compile(
    rf"(?<![\w.\^])[-+]?(?P<root>√\{{?\s*)?[{_CURRENCY}]?[-+]?"
    rf"(?P<body>(?:[0-9]+\s+(?=[0-9]+/[0-9]))?\.?[0-9](?:[0-9{_THIN}.,:/'’]*[0-9])?)"
    rf"(?P<power>[eE][-+]?[0-9]+(?![0-9.])|\s*[×x*]\s*10\s*\^\s*\{{?\s*[-+]?[0-9]+\}}?)?"
    rf"(?P<many>\s+(?:{'|'.join(_POWERS)})\b)?"
    rf"(?P<percent>\s?%|\s+percent\b)?"
    rf"(?P<rest>\s*\^\s*\{{?\s*[-+]?[0-9]*|\s*\\[a-zA-Z]|[A-Za-z]\b)?"
)
_EXPONENT = re.compile(r"([-+]?[0-9]+)\}?$")
_NAMED = re.compile(r"\s*[A-Za-z]\s*=\s*")
_UNIT = re.compile(r"\s*(?:[A-Za-z°][A-Za-z .°²³/\-]*)?[.!]?\s*")


def after_thinking(text: str) -> str:
    """What follows the last `</think>`; nothing of a reply that was cut while it thought."""
    before, closed, said = text.rpartition("</think>")
    del before
    if not closed and "<think>" in text:
        return ""
    return said


def boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{...}` (or `\\fbox{...}`), braces balanced; None without one that is closed."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    opened = text.find("{", start) if start >= 0 else -1
    if opened < 0 or text[start:opened].strip() not in ("\\boxed", "\\fbox"):
        return None
    depth, place = 0, opened
    while place < len(text):
        if text[place] == "\\":
            place += 1  # an escaped brace is text
        elif text[place] == "{":
            depth += 1
        elif text[place] == "}":
            depth -= 1
            if depth == 0:
                return text[opened + 1 : place].strip()
        place += 1
    return None


def after_hash(text: str) -> str | None:
    """The line behind the last `####`, as GSM8K writes its answers."""
    found = _HASH.findall(text)
    return found[-1].strip() if found else None


def tagged(text: str) -> str | None:
    """What stands between the last `<answer>` and `</answer>`."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return text[start + len("<answer>") : end].strip() if start >= 0 else None


def last_line(text: str) -> str | None:
    """The last line with something in it."""
    lines = text.split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), None)


def last_number(text: str) -> str | None:
    """The last that looks like a number, as it is written."""
    found = list(_LIKE.finditer(_plain(text)))
    return found[-1][0].strip() if found else None


def whole(text: str) -> str | None:
    """All of it; None of an empty one."""
    return text.strip() or None


PLACES: Mapping[str, Callable[[str], str | None]] = MappingProxyType(
    {
        "boxed": boxed,
        "hash": after_hash,
        "answer": tagged,
        "last_line": last_line,
        "last_number": last_number,
        "all": whole,
    }
)
"""Where an answer may stand in a reply -> what stands there, or None."""


def answer_in(text: str, places: tuple[str, ...]) -> str | None:
    """What stands at the first of these places that the reply has; None where it has none of them."""
    said = after_thinking(text)
    found = (PLACES[place](said) for place in places)
    return next((each for each in found if each is not None), None)


def read_number(text: str, *, decimal: str = ".", percent: bool = False) -> Fraction | None:
    """The number that the text is; None where it is none, or more than one.

    `x = ` before it and a unit behind it (`12 apples`, `5 cm`) change nothing.

    Args:
        decimal: what stands before tenths, "." or ","; the other one stands between thousands.
        percent: whether 12% is 12 hundredths; False: the sign is passed over, and 12% is 12.
    """
    said = _plain(text).strip().strip("$").strip()
    named = _NAMED.match(said)
    found = _LIKE.match(re.sub(r"^([-+])\s+(?=[0-9.])", r"\1", said[named.end() if named else 0 :].strip()))
    if found is None:
        return None
    rest = found.string[found.end() :]
    if not _UNIT.fullmatch(rest) or _NO_UNITS & set(re.split(r"[\s./\-]+", rest.lower())):
        return None
    return _value(found, decimal, percent)


def _plain(text: str) -> str:
    """Without LaTeX, and with one spelling of what has several."""
    if "\\" in text or "{" in text:
        text = _FRACTION.sub(_written_out, text)
        for pattern, said in _LATEX:
            text = pattern.sub(said, text)
    return _ONE_SIGN.sub(_written_out, text).translate(_SPELLINGS)


def _written_out(found: re.Match[str]) -> str:
    """A fraction as 3/4; behind a digit it is the second part of a mixed number."""
    mixed = found.start() > 0 and found.string[found.start() - 1].isdigit()
    above_below = [each for each in found.groups() if each is not None]
    return (" " if mixed else "") + ("/".join(above_below) or _VULGAR[found[0]])


def _value(found: re.Match[str], decimal: str, percent: bool) -> Fraction | None:
    before = found[0][: found.start("body") - found.start()]
    if found["rest"] or found["root"] or before.count("-") + before.count("+") > 1:
        return None
    size = _size(found["body"], decimal)
    if size is None:
        return None
    value = -size if "-" in before else size
    if found["power"]:
        digits = _EXPONENT.search(found["power"].rstrip())
        if digits is None or len(digits[1]) > 5 or abs(int(digits[1])) > _LONGEST:
            return None
        value *= Fraction(10) ** int(digits[1])
    if found["many"]:
        value *= _POWERS[found["many"].strip()]
    return value / 100 if percent and found["percent"] else value


def _size(body: str, decimal: str) -> Fraction | None:
    """A number without a sign: whole, decimal, a fraction or a mixed number."""
    if len(body) > _LONGEST:
        return None
    shape = _shapes(decimal).fullmatch(body)
    if shape is None:
        return None
    if shape["below"] is not None:
        below = int(shape["below"])
        return None if below == 0 else int(shape["ones"] or 0) + Fraction(int(shape["above"]), below)
    over = _decimal(shape["number"], decimal)
    under = Fraction(1) if shape["under"] is None else _decimal(shape["under"], decimal)
    return None if under == 0 else over / under


@cache
def _shapes(decimal: str) -> re.Pattern[str]:
    point = re.escape(decimal)
    group = rf"[{_THIN}'’{re.escape('.' if decimal == ',' else ',')}]"
    number = rf"(?:[0-9]{{1,3}}(?:{group}[0-9]{{3}})+|[0-9]+)(?:{point}[0-9]+)?|{point}[0-9]+"
    mixed = r"(?P<ones>[0-9]+)\s+(?P<above>[0-9]+)/(?P<below>[0-9]+)"
    return re.compile(rf"{mixed}|(?P<number>{number})(?:/(?P<under>{number}))?")


def _decimal(written: str, decimal: str) -> Fraction:
    ones, _, tenths = written.partition(decimal)
    return Fraction(f"{re.sub('[^0-9]', '', ones) or '0'}.{tenths or '0'}")
