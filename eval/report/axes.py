"""Axes: from numbers to places on the page, with round ticks."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from . import svg
from .text import MINUS

CHARACTER = 6.2  # average width of a character of the figures' 11-unit text


@dataclass(frozen=True)
class Axis:
    """One axis: values `low` to `high` lie from `start` to `end`.

    `root`: the places go with the square root of the value (which must not be negative).
    """

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    root: bool = False

    def at(self, value: float) -> float:
        """Where a value lies; what is beyond an end lies at that end."""
        value = min(max(value, self.low), self.high)
        low, high, value = (math.sqrt(max(v, 0.0)) if self.root else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def label(self, tick: float) -> str:
        return tick_label(tick, (tick,) if self.root else self.ticks)


def axis(values: Iterable[float], start: float, end: float, *, ticks: int = 5, tight: bool = False) -> Axis:
    """An axis over all values; its ends are ticks unless it is `tight`, where they are the values' own."""
    low, high = _range(values)
    found = round_ticks(low, high, ticks)
    if tight:
        return Axis(low, high, start, end, tuple(t for t in found if low <= t <= high))
    return Axis(found[0], found[-1], start, end, found)


def round_ticks(low: float, high: float, intervals: int) -> tuple[float, ...]:
    """Multiples of a round step (1, 2, 2.5 or 5 times a power of ten); the first and the last enclose `low` to `high`.

    The step is the smallest that goes into the range at most `intervals` times, or a smaller one where fewer than two
    of its multiples lie within the range. These are the ticks of matplotlib's `MaxNLocator`.
    """
    least = (high - low) / intervals
    magnitude = 10.0 ** math.floor(math.log10(least))
    steps = [factor * magnitude for factor in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 2.5, 5.0, 10.0, 20.0)]
    largest = next(place for place, step in enumerate(steps) if step >= least)
    found: tuple[float, ...] = ()
    for step in reversed(steps[: largest + 1]):
        slack = max(1e-10, 1e-15 * max(abs(low), abs(high)) / step)  # an end that is a multiple but for rounding is one
        first, last = math.floor(low / step + slack), math.ceil(high / step - slack)
        found = tuple(n * step for n in range(first, last + 1))
        if sum(low <= tick <= high for tick in found) >= 2:
            break
    return found


def root_axis(values: Iterable[float], start: float, end: float) -> Axis:
    """A square-root axis from 0, for KL: small distances stay readable beside a base far away."""
    high = 1.04 * max(_range([0.0, *values])[1], 1e-6)
    magnitude = 10.0 ** math.floor(math.log10(high))
    candidates = [0.0] + [m * magnitude * f for m in (0.01, 0.1, 1) for f in (1, 2, 5)]
    kept: list[float] = []
    place = Axis(0.0, high, start, end, (), root=True)
    for tick in candidates:
        if tick <= high and all(abs(place.at(tick) - place.at(other)) > 34 for other in kept):
            kept.append(tick)
    return Axis(0.0, high, start, end, tuple(kept), root=True)


def tick_label(tick: float, ticks: Sequence[float]) -> str:
    """As many decimals as tell the ticks apart, and no more."""
    largest = max((abs(each) for each in ticks), default=0.0)
    if largest >= 1e5 or (0 < largest < 1e-3):
        text = "0" if tick == 0 else f"{tick:.2g}"
    else:
        digits = next((d for d in range(7) if all(abs(round(t, d) - t) <= 1e-9 + 1e-6 * largest for t in ticks)), 6)
        text = f"{tick:,.{digits}f}"
        text = text.lstrip("-") if not float(text.replace(",", "")) else text
    return text.replace("-", MINUS, 1) if text.startswith("-") else text


def frame(
    x: Axis, y: Axis, x_title: str, y_title: str, *, y_label: Callable[[float], str] | None = None
) -> list[Markup]:
    """Grid, ticks and titles of a plot whose area is given by its axes (y.start is the floor)."""
    y_label, x_label = y_label or y.label, x.label
    parts = [svg.line(x.start, y.at(t), x.end, y.at(t), "grid") for t in y.ticks]
    parts.append(svg.line(x.start, y.start, x.end, y.start, "axis"))
    parts += [svg.text(x.start - 6, y.at(t) + 3.6, y_label(t), anchor="end") for t in y.ticks]
    for tick in x.ticks:
        place = x.at(tick)
        parts.append(svg.line(place, y.start, place, y.start + 4, "axis"))
        parts.append(svg.text(place, y.start + 15, x_label(tick), anchor="middle"))
    if x_title:
        parts.append(svg.text((x.start + x.end) / 2, y.start + 31, x_title, anchor="middle", class_="title"))
    if y_title:
        parts.append(svg.text(4, y.end - 10, y_title, class_="title"))
    return parts


def left_margin(y: Axis, least: float = 30.0) -> float:
    """Room for the labels of a vertical axis."""
    return max(least, 12 + CHARACTER * max((len(y.label(t)) for t in y.ticks), default=0))


def place_labels(
    points: Sequence[tuple[float, float, str]], width: float, floor: float, radius: float = 8.0
) -> list[tuple[float, float, str]]:
    """(x, y, anchor) of the label of each point, so that labels cover neither each other nor a point where they can.

    Args:
        points: (x, y, label).
        width, floor: right and lower edge that labels keep within.
    """
    taken = [(x - radius, y - radius, x + radius, y + radius) for x, y, _ in points]
    placed: list[tuple[float, float, str]] = []
    for own, (x, y, label) in enumerate(points):
        length = CHARACTER * len(label) + 2
        candidates = [
            (x + radius + 1, y - 5, "start"), (x + radius + 1, y + 12, "start"), (x - radius - 1, y - 5, "end"),
            (x - radius - 1, y + 12, "end"), (x, y - radius - 6, "middle"), (x, y + radius + 13, "middle"),
            (x + radius + 1, y - 18, "start"), (x - radius - 1, y - 18, "end"), (x + radius + 1, y + 24, "start"),
        ]  # fmt: skip

        def box(place: tuple[float, float, str], length: float = length) -> tuple[float, float, float, float]:
            left = place[0] - {"start": 0.0, "middle": length / 2, "end": length}[place[2]]
            return left, place[1] - 10, left + length, place[1] + 3

        def cost(place: tuple[float, float, str], own: int = own) -> float:
            left, top, right, bottom = box(place)
            outside = 1e4 * (left < 0 or right > width or bottom > floor or top < 0)
            others = taken[:own] + taken[own + 1 :]
            return outside + sum(
                max(0.0, min(right, r) - max(left, l_)) * max(0.0, min(bottom, b) - max(top, t))
                for l_, t, r, b in others
            )

        best = min(candidates, key=cost)
        taken.append(box(best))
        placed.append(best)
    return placed


def _range(values: Iterable[float]) -> tuple[float, float]:
    """Lowest and highest, never the same."""
    known = [float(value) for value in values if math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = 0.5 * abs(high) or 0.5
        return low - room, high + room
    return low, high
