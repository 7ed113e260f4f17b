"""Reward against KL: where the policies stand, PPO's way there, best of n, and over-optimisation (arXiv 2210.10760)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
from markupsafe import Markup

from ..statistics.intervals import Z95
from ..statistics.overoptimisation import BEST_OF_N, RL, Form, gain, peak
from . import svg
from .axes import Axis, axis, frame, left_margin, place_labels, root_axis
from .read import Run, number
from .text import fixed, short
from .winrates import score_errors

FAR = 4  # times the furthest measured KL; a fitted peak beyond that says nothing
WIDTH, HEIGHT = 380, 290


@dataclass(frozen=True)
class Fit:
    """A fitted gain over the SFT policy as a function of d = sqrt(KL); `form` is `BEST_OF_N` or `RL`."""

    form: Form
    alpha: float
    beta: float

    def gain(self, d: Any) -> Any:
        return gain(self.form, self.alpha, self.beta, d)

    def peak(self) -> float | None:
        """The d at which the gain is highest; None where it rises without end or falls from the start."""
        return peak(self.form, self.alpha, self.beta)

    def formula(self) -> str:
        beta = 0.0 if abs(self.beta) < 1e-9 * abs(self.alpha) else self.beta  # rounding of the fit
        filled = self.form.replace("alpha", short(self.alpha))
        sign = "−" if beta >= 0 else "+"
        return "gain = " + filled.replace("- beta", f"{sign} {short(abs(beta))}")


@dataclass(frozen=True)
class Point:
    """A place with standard errors; None where there is none."""

    label: str
    kl: float
    score: float
    kl_se: float | None = None
    score_se: float | None = None

    def said(self) -> str:
        return f"{self.label}: KL {fixed(self.kl)}, score {short(self.score)}"


def frontiers(run: Run) -> list[tuple[str, Markup]]:
    """(judge, figure) of every judge that scores, where KL was measured."""
    errors, places = score_errors(run), method_places(run)
    drawn = []
    for judge in run.judges():
        points = {}
        for row in run.results:
            kl, score = number(row.get("kl")), number(row.get("mean_score"))
            if row.get("judge") == judge and kl is not None and score is not None:
                se = errors.get((row["policy"], judge))
                points[row["policy"]] = Point(row["policy"], kl, score, number(row.get("kl_se")), number(se))
        if points and any(point.kl > 0 for point in points.values()):
            ways = _ways(run.overoptimisation or {}, judge)
            reference = run.reference() or "the reference"
            drawn.append((judge, _frontier(judge, points, places, ways, reference, run.bounds(judge))))
    return drawn


def method_places(run: Run) -> dict[str, int]:
    """Colour and marker of every policy, and after them of methods that are no policy."""
    methods = [each["method"] for each in _methods(run.overoptimisation or {})]
    return {name: place for place, name in enumerate(dict.fromkeys([*run.policies(), *methods]))}


def _ways(content: Mapping[str, Any], judge: str) -> dict[str, list[Point]]:
    """Method -> its points under this judge, by KL."""
    side = next((each for each in ("proxy", "gold") if content.get(each) == judge), None)
    return {} if side is None else {m["method"]: _points(m, side) for m in _methods(content) if _points(m, side)}


def _methods(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [each for each in content.get("methods") or [] if isinstance(each, Mapping) and each.get("method")]


def _points(method: Mapping[str, Any], side: str) -> list[Point]:
    found = []
    for each in method.get("points") or []:
        kl, score = number(each.get("kl")), number(each.get(side))
        if kl is not None and score is not None:
            error = number(each.get(f"{side}_se"))
            found.append(Point(str(each.get("label", "")), max(kl, 0.0), score, number(each.get("kl_se")), error))
    return sorted(found, key=lambda point: point.kl)


def _frontier(
    judge: str,
    points: Mapping[str, Point],
    places: Mapping[str, int],
    ways: Mapping[str, list[Point]],
    reference: str,
    bounds: tuple[float, float],
) -> Markup:
    everything = [*points.values(), *(point for way in ways.values() for point in way)]
    floor, top = HEIGHT - 42.0, 30.0
    y = axis([v for p in everything for v in _ends(p.score, p.score_se, bounds)], floor, top)
    x = root_axis([_ends(p.kl, p.kl_se)[1] for p in everything], left_margin(y), WIDTH - 14.0)
    parts = frame(x, y, f"KL to {reference}, nats per reply (square-root scale)", f"mean score, {judge}")
    labels: list[tuple[float, float, str]] = []
    for method, way in ways.items():
        place = places[method]
        corners = [(x.at(p.kl), y.at(p.score)) for p in way]
        parts.append(svg.tag("polyline", points=svg.path_points(corners), class_=f"way {svg.series(place)}"))
        parts += [
            svg.marker(place, *corner, 2.6, hollow=True, title=f"{method}, {p.said()}")
            for corner, p in zip(corners, way, strict=True)
        ]
        if method not in points:
            labels.append((*corners[-1], words(method)))
    for policy, point in points.items():
        parts += _cross(point, x, y, places[policy], bounds)
        labels.append((x.at(point.kl), y.at(point.score), policy))
    spots = place_labels(labels, WIDTH, floor)
    parts += [
        svg.text(*spot[:2], label[2], anchor=spot[2], class_="label") for spot, label in zip(spots, labels, strict=True)
    ]
    said = "; ".join(point.said() for point in points.values())
    return svg.figure(WIDTH, HEIGHT, f"Mean score by {judge} against KL", f"{said}.", parts)


def _cross(point: Point, x: Axis, y: Axis, place: int, bounds: tuple[float, float]) -> list[Markup]:
    """A policy's marker with the 95% intervals of both numbers, that of the score within what the judge can give."""
    cx, cy, colour = x.at(point.kl), y.at(point.score), svg.series(place)
    parts = []
    if point.kl_se:
        low, high = _ends(point.kl, point.kl_se)
        parts.append(svg.line(x.at(max(low, 0.0)), cy, x.at(high), cy, f"error {colour}"))
    if point.score_se:
        low, high = _ends(point.score, point.score_se, bounds)
        parts.append(svg.line(cx, y.at(low), cx, y.at(high), f"error {colour}"))
    return [*parts, svg.marker(place, cx, cy, 5, title=point.said())]


def overoptimisation(run: Run) -> dict[str, Any] | None:
    """The figures of the proxy's and the gold judge's gain, and what the fits say; None where nothing was measured."""
    content = run.overoptimisation or {}
    methods = [m for m in _methods(content) if len(_points(m, "proxy")) > 1 or len(_points(m, "gold")) > 1]
    if not methods:
        return None
    places = method_places(run)
    sides = [(side, str(content.get(side) or side)) for side in ("proxy", "gold")]
    return {
        "proxy": sides[0][1],
        "gold": sides[1][1],
        "prompts": content.get("prompts"),
        "figures": [(side, judge, _gains(side, judge, methods, places, run.bounds(judge))) for side, judge in sides],
        "methods": [{"name": m["method"], "words": words(m["method"]), "place": places[m["method"]]} for m in methods],
        "peaks": [_peak_words(m, side, judge, fit) for m in methods for side, judge in sides if (fit := _fit(m, side))],
    }


def _gains(
    side: str,
    judge: str,
    methods: Sequence[Mapping[str, Any]],
    places: Mapping[str, int],
    bounds: tuple[float, float],
) -> Markup:
    """Points with their intervals and the fitted lines, each as far as the judge's scores can go."""
    limits = {m["method"]: _limits(_points(m, side), bounds) for m in methods if _points(m, side)}
    lines = {m["method"]: _relative(_points(m, side)) for m in methods if _points(m, side)}
    furthest = max((math.sqrt(p.kl) for line in lines.values() for p in line), default=1.0) * 1.05 or 1.0
    fits = {m["method"]: fit for m in methods if m["method"] in lines and (fit := _fit(m, side))}
    curves = {name: _curve(fit, lines[name], limits[name]) for name, fit in fits.items()}
    floor, top = HEIGHT - 42.0, 30.0
    values = [v for name, line in lines.items() for p in line for v in _ends(p.score, p.score_se, limits[name])]
    y = axis([*values, 0.0, *(v for curve in curves.values() for _, v in curve)], floor, top)
    x = axis([0.0, furthest], left_margin(y), WIDTH - 14.0)
    x = Axis(0.0, furthest, x.start, x.end, tuple(t for t in x.ticks if 0 <= t <= furthest))
    parts = frame(x, y, "√KL to the SFT policy, √nats", f"gain of the {side}, {judge}")
    if y.low < 0 < y.high:
        parts.append(svg.line(x.start, y.at(0), x.end, y.at(0), "axis"))
    for m in methods:
        name = m["method"]
        colour = svg.series(places[name])
        if name in curves:
            drawn = svg.path_points([(x.at(d), y.at(v)) for d, v in curves[name]])
            parts.append(svg.tag("polyline", points=drawn, class_=f"line {colour} dash{places[name] % 3}"))
            peak = fits[name].peak()
            if peak is not None and peak <= furthest and float(fits[name].gain(peak)) <= limits[name][1]:
                at, height = x.at(peak), y.at(float(fits[name].gain(peak)))
                parts += [svg.line(at, height, at, floor, f"peak {colour}")]
                parts.append(svg.text(at + 5, floor - 6, f"peak, KL {fixed(peak**2, 1)}", class_="peak-label"))
        for p in lines.get(name, []):
            at, height = x.at(math.sqrt(p.kl)), y.at(p.score)
            if p.score_se:
                low, high = _ends(p.score, p.score_se, limits[name])
                parts.append(svg.line(at, y.at(low), at, y.at(high), f"error {colour}"))
            parts.append(svg.marker(places[name], at, height, 4, title=f"{name}, {p.label}: gain {short(p.score)}"))
    said = "; ".join(
        f"{words(name)} gains {short(line[-1].score)} at KL {fixed(line[-1].kl, 1)}" for name, line in lines.items()
    )
    return svg.figure(WIDTH, HEIGHT, f"Gain of the {side} score ({judge}) against √KL", f"{said}.", parts)


def _limits(points: list[Point], bounds: tuple[float, float]) -> tuple[float, float]:
    """The lowest and the highest gain that the judge's scores leave room for."""
    start = points[0].score
    return bounds[0] - start, bounds[1] - start


def _relative(points: list[Point]) -> list[Point]:
    """Scores less that of the SFT policy, which is the point of the lowest KL."""
    start = points[0].score
    return [Point(p.label, p.kl, p.score - start, p.kl_se, p.score_se) for p in points]


def _fit(method: Mapping[str, Any], side: str) -> Fit | None:
    """A method's fit on one side; None without one that is understood."""
    fit = method.get("fit") or {}
    given = fit.get(side) or {}
    alpha, beta = number(given.get("alpha")), number(given.get("beta"))
    if fit.get("form") not in (BEST_OF_N, RL) or alpha is None or beta is None:
        return None
    return Fit(fit["form"], alpha, beta)


def _curve(fit: Fit, line: list[Point], limits: tuple[float, float]) -> list[tuple[float, float]]:
    """The fitted gain up to where it leaves what the judge can give."""
    furthest = math.sqrt(max(p.kl for p in line)) * 1.04 or 1.0
    ds = np.linspace(furthest / 400, furthest, 80)
    inside = takewhile(lambda at: limits[0] <= at[1] <= limits[1], zip(ds.tolist(), fit.gain(ds).tolist(), strict=True))
    return [(0.0, 0.0), *inside]


def _peak_words(method: Mapping[str, Any], side: str, judge: str, fit: Fit) -> str:
    said = f"{words(method['method'])}, {side} ({judge}): {fit.formula()}"
    furthest, peak = max((p.kl for p in _points(method, side)), default=0.0), fit.peak()
    if peak is None or peak**2 > FAR * furthest:
        return f"{said}; no peak anywhere near what was measured."
    beyond = "" if peak**2 <= furthest else ", beyond what was measured"
    return f"{said}; highest, {short(float(fit.gain(peak)))}, at KL {fixed(peak**2, 1)} nats{beyond}."


def words(method: str) -> str:
    return "best of n" if method == "best_of_n" else method


def _ends(
    value: float, error: float | None, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> tuple[float, float]:
    """The 95% interval, as far as the bounds let it reach."""
    low, high = value - Z95 * (error or 0.0), value + Z95 * (error or 0.0)
    return max(low, min(bounds[0], value)), min(high, max(bounds[1], value))
