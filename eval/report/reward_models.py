"""Reward models: accuracy against the length baselines, and how far their confidence can be believed."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from ..doctor.reward_model_checks import length_remedy, length_separates
from . import svg
from .axes import Axis, frame
from .read import Run, number
from .text import percent, percents, short

WIDTH, HEIGHT = 340, 322
_STRIP = 44  # height of the strip with the bins' counts


def reward_rows(run: Run) -> list[dict[str, Any]]:
    """One row a reward model with its figures; from metrics.json of the reward stages where nothing better is there."""
    rows = list(run.rewards) or [
        _from_metrics(s.name, s.metrics) for s in run.stages if s.record is not None and s.record.produces == "reward"
    ]
    shown = []
    for place, row in enumerate(each for each in rows if each and number(each.get("accuracy")) is not None):
        bins = [b for b in row.get("calibration") or [] if isinstance(b, Mapping) and _usable(b)]
        shown.append(
            {
                **row,
                "title": f"{row['stage']} (implicit reward)" if row.get("kind") == "implicit" else row["stage"],
                "place": place,
                "bar": accuracy_bar(row, place),
                "length": length_words(row),
                "figure": calibration(str(row["stage"]), bins, place) if bins else None,
            }
        )
    return shown


def length_words(row: Mapping[str, Any]) -> str:
    """What to think where length alone does as well as the model; empty where it does not."""
    rules = {name: rate for name in ("longer_wins", "shorter_wins") if (rate := number(row.get(name))) is not None}
    accuracy = number(row.get("accuracy"))
    if not rules or accuracy is None:
        return ""
    rule, best = max(rules.items(), key=lambda each: each[1])
    if not length_separates(accuracy, best):
        return ""
    return f"{row['stage']}: {length_remedy(rule.replace('_', ' '), best)}."


def accuracy_bar(row: Mapping[str, Any], place: int) -> Markup:
    """Accuracy with its interval from 0 to 100%, the length baselines as ticks, chance in the middle."""
    scale = Axis(0.0, 1.0, 8.0, 192.0, ())
    value, low, high = (number(row.get(key)) for key in ("accuracy", "ci_low", "ci_high"))
    colour = svg.series(place + 1)
    parts = [svg.line(scale.start, 13, scale.end, 13, "axis"), svg.line(scale.at(0.5), 4, scale.at(0.5), 22, "middle")]
    said = [f"accuracy {percent(value)}"]
    if low is not None and high is not None:
        said.append(f"95% interval {percents(low, high)}")
        parts.append(svg.line(scale.at(low), 13, scale.at(high), 13, f"range {colour}"))
        parts += [svg.line(scale.at(end), 9, scale.at(end), 17, f"cap {colour}") for end in (low, high)]
    for key, name in (("longer_wins", "longer"), ("shorter_wins", "shorter")):
        baseline = number(row.get(key))
        if baseline is not None:
            said.append(f"{name} wins {percent(baseline)}")
            parts.append(svg.tag("path", d=f"M{scale.at(baseline):.1f} 19l-4 7h8z", class_="baseline"))
    parts.append(svg.marker(place + 1, scale.at(value or 0.0), 13, 5))
    return svg.figure(200, 28, f"{row['stage']}: {', '.join(said)}", "", parts, kind="bar wide")


def calibration(stage: str, bins: list[Mapping[str, Any]], place: int) -> Markup:
    """Reliability diagram: how often the favoured reply was the chosen one, against how sure the model was."""
    floor, top = HEIGHT - 42.0 - _STRIP - 8, 30.0
    lowest = min([0.5, *(v for b in bins if (v := number(b.get("ci_low"))) is not None)])
    bottom = 0.0 if lowest < 0.25 else 0.25 if lowest < 0.45 else 0.4
    step = 0.25 if bottom < 0.4 else 0.1
    ticks = tuple(round(bottom + step * i, 2) for i in range(round((1 - bottom) / step) + 1))
    y = Axis(bottom, 1.0, floor, top, ticks)
    x = Axis(0.5, 1.0, 44.0, WIDTH - 14.0, (0.5, 0.6, 0.7, 0.8, 0.9, 1.0))
    strip = Axis(0.5, 1.0, x.start, x.end, x.ticks)
    base = HEIGHT - 42.0
    parts = frame(Axis(0.5, 1.0, x.start, x.end, ()), y, "", "share of pairs that the favoured reply wins",
                  y_label=lambda t: percent(t, 0))  # fmt: skip
    parts.append(svg.line(x.at(0.5), y.at(0.5), x.at(1.0), y.at(1.0), "diagonal"))
    most = max(int(b["n"]) for b in bins)
    colour = svg.series(place + 1)
    for each in bins:
        low, high, n = float(each["low"]), float(each["high"]), int(each["n"])
        tall = max(1.5, (_STRIP - 16) * n / most)
        left, right = strip.at(low) + 1, strip.at(high) - 1
        parts.append(svg.tag("rect", x=left, y=base - tall, width=max(right - left, 1.0), height=tall, class_="tally"))
        parts.append(svg.text((left + right) / 2, base - tall - 3, n, anchor="middle", class_="tiny"))
    parts.append(svg.line(x.start, base, x.end, base, "axis"))
    for tick in x.ticks:
        parts.append(svg.text(x.at(tick), base + 15, percent(tick, 0), anchor="middle"))
    parts.append(svg.text((x.start + x.end) / 2, base + 31, "confidence of the model", anchor="middle", class_="title"))
    ordered = sorted(bins, key=lambda b: float(b["confidence"]))
    corners = [(x.at(float(b["confidence"])), y.at(float(b["accuracy"]))) for b in ordered]
    parts.append(svg.tag("polyline", points=svg.path_points(corners), class_=f"way {colour}"))
    for each, (cx, cy) in zip(ordered, corners, strict=True):
        low, high = number(each.get("ci_low")), number(each.get("ci_high"))
        if low is not None and high is not None:
            parts.append(svg.line(cx, y.at(low), cx, y.at(high), f"error {colour}"))
        said = f"confidence {percent(each['confidence'])}, right {percent(each['accuracy'])}, {short(each['n'])} pairs"
        parts.append(svg.marker(place + 1, cx, cy, 4, title=said))
    words = "; ".join(f"{percent(b['confidence'], 0)} sure, {percent(b['accuracy'], 0)} right" for b in ordered)
    return svg.figure(WIDTH, HEIGHT, f"Calibration of {stage}", f"{words}.", parts)


def _usable(each: Mapping[str, Any]) -> bool:
    """Whether a calibration bin has pairs and all its numbers."""
    known = (number(each.get(key)) is not None for key in ("low", "high", "confidence", "accuracy"))
    return (number(each.get("n")) or 0) > 0 and all(known)


def _from_metrics(stage: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What a reward stage measured on its own held-out pairs at its end."""
    if number(metrics.get("held_out_accuracy")) is None:
        return {}
    return {
        "stage": stage,
        "kind": "reward",
        "n": metrics.get("held_out_pairs"),
        "accuracy": metrics.get("held_out_accuracy"),
        "longer_wins": metrics.get("held_out_longer_wins"),
        "shorter_wins": metrics.get("held_out_shorter_wins"),
        "held_out": True,
    }


def accuracy_words(row: Mapping[str, Any]) -> str:
    """ "91.5% (88.2 to 94.1%)"."""
    interval = percents(row.get("ci_low"), row.get("ci_high"))
    return percent(row.get("accuracy")) + (f" ({interval})" if interval else "")
