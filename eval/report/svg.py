"""Inline SVG: elements that escape what they are given, and a figure with a name and a description.

Colours come from the page's CSS classes alone, so that a figure follows light and dark: `s0` to `s5` set the colour of
a series; a series past the sixth repeats a colour, never its marker and its colour together before the thirtieth.
"""

import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

Piece = Markup | str
COLOURS = 6
_SHAPES = ("circle", "square", "triangle", "diamond", "down")


def tag(name: str, *children: Piece, **attributes: object) -> Markup:
    """One element. `text_anchor="end"` becomes text-anchor="end", `class_` becomes class; None is left out."""
    given = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _plain(value))
        for key, value in attributes.items()
        if value is not None
    )
    inner = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), given, inner)


def figure(
    width: float, height: float, label: str, description: str, body: Iterable[Piece], *, kind: str = "plot"
) -> Markup:
    """The <svg> of a whole figure. `label` names it; `description` says in words what is seen."""
    inner = Markup("").join([tag("desc", description) if description else Markup(""), *map(escape, body)])
    return Markup(
        '<svg class="{}" viewBox="0 0 {} {}" style="--w:{}" role="img" aria-label="{}" focusable="false">{}</svg>'
    ).format(kind, _plain(width), _plain(height), _plain(width), label, inner)


def series(place: int) -> str:
    """The CSS class that gives a series its colour."""
    return f"s{place % COLOURS}"


def marker(place: int, x: float, y: float, radius: float = 4.5, *, hollow: bool = False, title: str = "") -> Markup:
    """The marker of a series: colour and shape together, so that neither is needed alone."""
    shape = _SHAPES[place % len(_SHAPES)]
    classes = f"mark {series(place)}{' hollow' if hollow else ''}"
    inside = [tag("title", title)] if title else []
    if shape == "circle":
        return tag("circle", *inside, class_=classes, cx=x, cy=y, r=radius)
    if shape == "square":
        side = 0.9 * radius
        return tag("rect", *inside, class_=classes, x=x - side, y=y - side, width=2 * side, height=2 * side)
    corners = {"triangle": (-90, 3, 1.25), "diamond": (0, 4, 1.25), "down": (90, 3, 1.25)}[shape]
    first, count, scale = corners
    angles = [math.radians(first + 360 * i / count) for i in range(count)]
    points = [(x + scale * radius * math.cos(a), y + scale * radius * math.sin(a)) for a in angles]
    return tag("polygon", *inside, class_=classes, points=path_points(points))


def key(place: int) -> Markup:
    """A series' marker by itself, for tables and legends; its name stands beside it, so it is silent."""
    return Markup('<svg class="key" viewBox="0 0 14 14" aria-hidden="true" focusable="false">{}</svg>').format(
        marker(place, 7, 7)
    )


def path_points(points: Sequence[tuple[float, float]]) -> str:
    """ "x,y x,y" for polyline and polygon."""
    return " ".join(f"{_plain(x)},{_plain(y)}" for x, y in points)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def text(x: float, y: float, words: object, *, anchor: str = "start", class_: str | None = None) -> Markup:
    return tag("text", str(words), x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=class_)


def _plain(value: object) -> object:
    """Coordinates to a tenth of a unit: finer is not seen, and the page stays small."""
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        raise ValueError(f"{value} in a figure")
    rounded = round(value, 1)
    return int(rounded) if rounded == int(rounded) else rounded
