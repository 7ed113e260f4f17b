"""Learning curves: what a stage logged, the telling numbers first and what belongs together in one panel."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup
from scipy.ndimage import uniform_filter1d

from . import svg
from .axes import axis, frame, left_margin
from .read import number
from .text import short

MAX_POINTS = 200
SMOOTH_FROM = 40  # points; shorter curves are drawn as they are
WIDTH, HEIGHT = 300, 182
_BOOKKEEPING = ("step", "epoch", "total_flos", "num_tokens", "num_input_tokens_seen", "episode")
_BOOKKEEPING_STARTS = ("train_", "time/")
_BOOKKEEPING_ENDINGS = ("_runtime", "_per_second", "_seconds", "num_tokens")

Series = dict[str, tuple[list[float], list[float]]]


class Panel(NamedTuple):
    """A panel's title, the unit of its numbers, its keys in the log, and what each key is called in it."""

    title: str
    unit: str
    keys: tuple[str, ...]
    names: tuple[str, ...] = ()


# In the order of interest; a panel appears where any of its keys was logged.
PANELS = (
    Panel("Loss", "", ("loss", "eval_loss"), ("training", "held out")),
    Panel("Reward", "judge's units", ("objective/scores", "objective/rlhf_reward"), ("score", "less the KL penalty")),
    Panel("KL to the reference", "nats per reply", ("objective/kl",)),
    Panel(
        "Accuracy on pairs", "share",
        ("accuracy", "eval_accuracy", "rewards/accuracies", "eval_rewards/accuracies"),
        ("training", "held out", "training", "held out"),
    ),
    Panel(
        "Reward margin", "chosen less rejected",
        ("margin", "eval_margin", "rewards/margins", "eval_rewards/margins"),
        ("training", "held out", "training", "held out"),
    ),
    Panel("Implicit rewards", "", ("rewards/chosen", "rewards/rejected"), ("chosen", "rejected")),
    Panel("Scores in a batch", "", ("max_reward", "mean_reward", "min_reward"), ("highest", "mean", "lowest")),
    Panel("Entropy", "nats per token", ("rollout/entropy_per_token", "entropy")),
    Panel("Token accuracy", "share", ("mean_token_accuracy", "eval_mean_token_accuracy"), ("training", "held out")),
    Panel("Reply length", "tokens", ("rollout/length",)),
    Panel("Replies that end by themselves", "share", ("rollout/eos_rate",)),
    Panel("Clipped tokens", "share", ("policy/clipfrac_avg", "val/clipfrac_avg"), ("policy", "value")),
    Panel("KL of one update", "nats per token", ("policy/approxkl_avg",)),
    Panel("Value: explained variance", "share", ("value/explained_variance",)),
    Panel("KL coefficient", "", ("objective/kl_coef",)),
)  # fmt: skip


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


def stage_curves(log: Sequence[Mapping[str, Any]]) -> tuple[list[Curve], list[Curve]]:
    """The panels of a stage: those of interest, and one for every other number that was logged at least twice."""
    counted, found = read_curves(log)
    lines = {key for key, (xs, _) in found.items() if len(xs) > 1}
    main, used = [], set()
    for panel in PANELS:
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


def draw(title: str, curves: Sequence[tuple[str, Sequence[float], Sequence[float]]], counted: str) -> Markup:
    """One panel: (name, places, values) of each curve; several carry their names and differ in their dashes."""
    thinned = [(name, thin(xs), thin(ys)) for name, xs, ys in curves]
    legend = 16 if len(curves) > 1 else 0
    top, floor = 10 + legend, HEIGHT - 36
    y = axis([v for _, _, ys in thinned for v in ys], floor, top, ticks=4)
    x = axis([v for _, xs, _ in thinned for v in xs], left_margin(y), WIDTH - 12, ticks=5, tight=True)
    parts = frame(x, y, counted, "")
    at = x.start
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
