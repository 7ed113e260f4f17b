"""Small inline SVG figures; colours come from the page's CSS classes, so that they follow light and dark."""

import itertools
import math
from collections.abc import Sequence

from markupsafe import Markup

WIDTH, HEIGHT = 300, 120
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 18
_MAX_POINTS = 200


def interval_bar(value: float, low: float, high: float, middle: float = 0.5) -> Markup:
    """A value in [0, 1] with its interval on a line from 0 to 1; the tick stands at `middle`."""
    x, left, right, tick = (round(2 + 156 * min(max(v, 0.0), 1.0), 1) for v in (value, low, high, middle))
    return Markup(
        '<svg class="bar" viewBox="0 0 160 18" role="img" aria-label="{label}">'
        '<line class="axis" x1="2" y1="9" x2="158" y2="9"/><line class="axis" x1="{tick}" y1="2" x2="{tick}" y2="16"/>'
        '<line class="range" x1="{left}" y1="9" x2="{right}" y2="9"/><circle class="dot" cx="{x}" cy="9" r="4"/></svg>'
    ).format(label=f"{value:.3f}, {low:.3f} to {high:.3f}", tick=tick, left=left, right=right, x=x)


def curve(steps: Sequence[float], values: Sequence[float], title: str) -> Markup:
    """A learning curve; long ones are drawn as the means of neighbouring points."""
    xs, ys = _thin(steps), _thin(values)
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = min(ys), max(ys)
    y_span, x_span = (y_high - y_low) or 1.0, (x_high - x_low) or 1.0
    points = " ".join(
        f"{_LEFT + (x - x_low) / x_span * (WIDTH - _LEFT - _RIGHT):.1f},"
        f"{HEIGHT - _BOTTOM - (y - y_low) / y_span * (HEIGHT - _TOP - _BOTTOM):.1f}"
        for x, y in zip(xs, ys, strict=True)
    )
    floor = HEIGHT - _BOTTOM
    return Markup(
        '<svg class="curve" viewBox="0 0 {w} {h}" role="img" aria-label="{title}: {first} to {last}">'
        '<path class="axis" d="M{l} {t}V{f}H{r}"/><polyline class="line" points="{points}"/>'
        '<text x="{a}" y="{ty}" text-anchor="end">{high}</text><text x="{a}" y="{f}" text-anchor="end">{low}</text>'
        '<text x="{l}" y="{by}">{x0}</text><text x="{r}" y="{by}" text-anchor="end">{x1}</text></svg>'
    ).format(
        w=WIDTH,
        h=HEIGHT,
        title=title,
        first=short(ys[0]),
        last=short(ys[-1]),
        l=_LEFT,
        t=_TOP,
        f=floor,
        r=WIDTH - _RIGHT,
        points=points,
        a=_LEFT - 4,
        ty=_TOP + 8,
        by=HEIGHT - 5,
        high=short(y_high),
        low=short(y_low),
        x0=short(x_low),
        x1=short(x_high),
    )


def short(value: float | int | None) -> str:
    """A number in at most four significant digits, for tables and axes."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}" if abs(value) < 1e15 else f"{value:.3g}"
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"


def _thin(values: Sequence[float]) -> list[float]:
    if len(values) <= _MAX_POINTS:
        return list(values)
    edges = [round(i * len(values) / _MAX_POINTS) for i in range(_MAX_POINTS + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
