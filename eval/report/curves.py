"""Learning curves: what a stage logged, the telling numbers first and what belongs together in one panel."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from scipy.ndimage import uniform_filter1d

from ...stages.kinds import KINDS, PPO, Panel
from ..statistics.over_seeds import t_interval
from . import svg
from .axes import axis, frame, left_margin
from .read import number
from .text import short

MAX_POINTS = 200
SMOOTH_FROM = 40  # points; shorter curves are drawn as they are
WIDTH, HEIGHT = 300, 182
_BOOKKEEPING = ("step", "epoch", "total_flos", "num_tokens", "num_input_tokens_seen", "episode")
_BOOKKEEPING_STARTS = ("train_", "time/", "step_time")
_BOOKKEEPING_ENDINGS = ("_runtime", "_per_second", "_seconds", "num_tokens")

Series = dict[str, tuple[list[float], list[float]]]


# Of a stage whose kind nobody knows any more: a panel appears where any of its keys was logged.
EVERY_PANEL = tuple(dict.fromkeys(panel for kind in (PPO, *KINDS.values()) for panel in kind.panels))


@dataclass(frozen=True)
class Curve:
    """One drawn panel: title, unit, last value in words, and the figure."""

    title: str
    unit: str
    last: str
    figure: Markup


def read_curves(log: Sequence[Mapping[str, Any]]) -> tuple[str, Series]:
    """What the horizontal axis counts ("episodes" or "steps"), and key -> (places, values) of what was logged."""
    counted = "episode" if any("episode" in line for line in log) else "step"
    found: Series = {}
    for place, line in enumerate(log):
        x = number(line.get(counted, line.get("step", place)))
        for key, raw in line.items():
            value = number(raw)
            bookkeeping = key in _BOOKKEEPING or key.startswith(_BOOKKEEPING_STARTS)
            if bookkeeping or key.endswith(_BOOKKEEPING_ENDINGS) or value is None or x is None:
                continue
            xs, ys = found.setdefault(key, ([], []))
            xs.append(x)
            ys.append(value)
    return f"{counted}s", found


def stage_curves(
    log: Sequence[Mapping[str, Any]], panels: Sequence[Panel] = EVERY_PANEL
) -> tuple[list[Curve], list[Curve]]:
    """The panels of a stage: those of its kind, and one for every other number that was logged at least twice."""
    counted, found = read_curves(log)
    lines = {key for key, (xs, _) in found.items() if len(xs) > 1}
    main, used = [], set()
    for panel in panels:
        # A single held-out measurement is a point beside a line, but no panel by itself.
        if any(key in lines for key in panel.keys):
            main.append(_panel(panel, found, counted))
            used |= set(panel.keys)
    rest = [_panel(Panel(key, "", (key,)), found, counted) for key in found if key in lines - used]
    return main, rest


def _panel(panel: Panel, found: Series, counted: str) -> Curve:
    keys = [key for key in panel.keys if key in found]
    names = [dict(zip(panel.keys, panel.names or panel.keys, strict=True))[key] for key in keys]
    last = short(found[keys[0]][1][-1])
    figure = draw(panel.title, [(name, *found[key]) for name, key in zip(names, keys, strict=True)], counted)
    return Curve(panel.title, panel.unit, last, figure)


def seed_curves(logs: Sequence[Sequence[Mapping[str, Any]]], panels: Sequence[Panel]) -> list[Curve]:
    """The panels of stages that differ in their seed alone: the mean at each place that all have, and around it the 95%
    interval of that mean over seeds."""
    read = [read_curves(log) for log in logs]
    shown = []
    for panel in panels:
        drawn: list[tuple[str, list[float], list[float]]] = []
        bands: list[tuple[list[float], list[float]]] = []
        for key, name in zip(panel.keys, panel.names or panel.keys, strict=True):
            each = [dict(zip(*found.get(key, ([], [])), strict=True)) for _, found in read]
            places = sorted(set.intersection(*map(set, each)))
            if len(places) > 1:
                fitted = [t_interval([one[place] for one in each]) for place in places]
                drawn.append((name, places, [mean for mean, *_ in fitted]))
                bands.append(([low for *_, low, _ in fitted], [high for *_, high in fitted]))
        if drawn:
            figure = draw(panel.title, drawn, read[0][0], bands)
            shown.append(Curve(panel.title, panel.unit, short(drawn[0][2][-1]), figure))
    return shown


def draw(
    title: str,
    curves: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    counted: str,
    bands: Sequence[tuple[Sequence[float], Sequence[float]]] = (),
) -> Markup:
    """One panel: (name, places, values) of each curve; several carry their names and differ in their dashes. `bands`:
    (lower ends, upper ends) around each, or none."""
    thinned = [(name, thin(xs), thin(ys)) for name, xs, ys in curves]
    legend = 16 if len(curves) > 1 else 0
    top, floor = 10 + legend, HEIGHT - 36
    around = [(thin(lows), thin(highs)) for lows, highs in bands]
    ends = [v for pair in around for each in pair for v in each]
    y = axis([*(v for _, _, ys in thinned for v in ys), *ends], floor, top, ticks=4)
    x = axis([v for _, xs, _ in thinned for v in xs], left_margin(y), WIDTH - 12, ticks=5, tight=True)
    parts = frame(x, y, counted, "")
    at = x.start
    for place, ((_, xs, _), (lows, highs)) in enumerate(zip(thinned, around, strict=False)):
        edge = [*zip(xs, lows, strict=True), *reversed(list(zip(xs, highs, strict=True)))]
        corners = svg.path_points([(x.at(a), y.at(b)) for a, b in edge])
        parts.append(svg.tag("polygon", points=corners, class_=f"band {svg.series(place + 1)}"))
    for place, (name, xs, ys) in enumerate(thinned):
        parts += _curve(place, [x.at(v) for v in xs], [y.at(v) for v in ys])
        if legend:
            colour = f"{svg.series(place + 1)} dash{place}"
            swatch = svg.line(at, 8, at + 20, 8, f"line {colour}")
            parts.append(swatch if len(xs) > 1 else svg.marker(place + 1, at + 10, 8, 4))
            parts.append(svg.text(at + 25, 12, name))
            at += 42 + 6.2 * len(name)
    said = "; ".join(
        f"{name if len(curves) > 1 else title} from {short(ys[0])} to {short(ys[-1])}" for name, _, ys in curves
    )
    span = f"over {short(x.low)} to {short(x.high)} {counted}"
    return svg.figure(WIDTH, HEIGHT, f"{title}: {said}", f"Learning curve {span}.", parts, kind="plot small")


def _curve(place: int, xs: Sequence[float], ys: Sequence[float]) -> list[Markup]:
    """A line; a long one faint, with its running mean over it."""
    colour = f"{svg.series(place + 1)} dash{place}"
    if len(xs) == 1:
        return [svg.marker(place + 1, xs[0], ys[0], 4)]
    plain = svg.tag("polyline", points=svg.path_points(list(zip(xs, ys, strict=True))), class_=f"line {colour}")
    if len(xs) < SMOOTH_FROM:
        return [plain]
    smooth = uniform_filter1d(list(ys), size=max(3, len(ys) // 12), mode="nearest").tolist()
    faint = svg.tag("polyline", points=svg.path_points(list(zip(xs, ys, strict=True))), class_=f"line faint {colour}")
    over = svg.tag("polyline", points=svg.path_points(list(zip(xs, smooth, strict=True))), class_=f"line {colour}")
    return [faint, over]


def thin(values: Sequence[float]) -> list[float]:
    """At most `MAX_POINTS` numbers: the means of neighbours."""
    if len(values) <= MAX_POINTS:
        return list(values)
    edges = [round(i * len(values) / MAX_POINTS) for i in range(MAX_POINTS + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
