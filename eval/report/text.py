"""Numbers in words, one way all over the page."""

from typing import Any

from ...values import is_finite

DASH = "–"
MINUS = "−"


def short(value: Any) -> str:
    """A number in at most four significant digits, for tables and axes; a dash where there is none."""
    if not is_finite(value):
        return DASH
    if isinstance(value, int) or float(value).is_integer():
        text = f"{int(value):,}" if abs(value) < 1e15 else f"{value:.3g}"
    else:
        text = f"{value:.4g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"
    return text.replace("-", MINUS, 1) if text.startswith("-") else text


def fixed(value: Any, digits: int = 2) -> str:
    """A number with a fixed number of decimals, so that a column lines up."""
    if not is_finite(value):
        return DASH
    text = f"{value:,.{digits}f}"
    return text.replace("-", MINUS, 1) if float(text.replace(",", "")) else text.lstrip("-")


def percent(value: Any, digits: int = 1) -> str:
    """A fraction of 1 in per cent."""
    return f"{fixed(100 * value, digits)}%" if is_finite(value) else DASH


def percents(low: Any, high: Any, digits: int = 1) -> str:
    """An interval of fractions of 1: "59.5 to 74.0%"."""
    return f"{fixed(100 * low, digits)} to {fixed(100 * high, digits)}%" if is_finite(low) and is_finite(high) else ""


def plus_minus(error: Any, digits: int = 2) -> str:
    """ "± 0.12" for a standard error, nothing where there is none."""
    return f"± {fixed(error, digits)}" if is_finite(error) else ""


def percent_error(error: Any, digits: int = 1) -> str:
    """ "± 1.2" for the standard error of a rate, in percentage points."""
    return f"± {fixed(100 * error, digits)}" if is_finite(error) else ""


def duration(value: Any) -> str:
    """Seconds as "9.3 s", "1 min 15 s" or "2 h 05 min"."""
    if not is_finite(value):
        return DASH
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{value:.1f} s"


def size(value: Any) -> str:
    """Bytes as "2.50 GB" or "12.3 MB"."""
    if not is_finite(value):
        return DASH
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"


def hash12(value: Any) -> str:
    """The first 12 characters of a hash, as Git shows one."""
    return str(value or "").removeprefix("sha256:")[:12]


def listed(words: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
