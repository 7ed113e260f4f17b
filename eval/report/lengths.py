"""How long the policies' replies are: one histogram per policy, all on one axis."""

from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from . import svg
from .axes import Axis, axis, frame, left_margin
from .read import Run, number
from .text import percent, short

BINS = 24
WIDTH, HEIGHT = 380, 196


@dataclass(frozen=True)
class Lengths:
    """One policy's histogram with the numbers that stand beside it; `cut`: share that the limit cut off."""

    policy: str
    place: int
    n: int
    median: float
    cut: float
    repetition: float | None
    repetition_se: float | None
    figure: Markup


def length_figures(run: Run) -> list[Lengths]:
    """One a policy, with the same axes, from the samples' token counts."""
    replies: dict[str, list[tuple[float, bool]]] = {}
    for sample in run.samples:
        count = number(sample.get("tokens"))
        if count is not None:
            replies.setdefault(sample["policy"], []).append((count, bool(sample.get("finished"))))
    if not replies:
        return []
    limit = run.token_limit()
    longest = max([*(count for each in replies.values() for count, _ in each), limit or 0])
    edges = _edges(longest)
    shares = {policy: _shares(each, edges) for policy, each in replies.items()}
    tallest = max(float((ended + cut).max()) for ended, cut in shares.values())
    rows, places = run.by_policy(), {policy: i for i, policy in enumerate(run.policies())}
    return [
        Lengths(
            policy, places[policy], len(each), float(np.median([count for count, _ in each])),
            sum(not finished for _, finished in each) / len(each),
            number(rows.get(policy, {}).get("repetition")), number(rows.get(policy, {}).get("repetition_se")),
            _histogram(policy, places[policy], each, edges, shares[policy], tallest, limit),
        )
        for policy, each in replies.items()
    ]  # fmt: skip


def _edges(longest: float) -> np.ndarray:
    """Bins of whole tokens, alike for all policies; the longest reply lies in the last."""
    width = max(1, int(np.ceil((longest + 1) / BINS)))
    return np.arange(0, longest + 1 + width, width, dtype=float)


def _shares(replies: list[tuple[float, bool]], edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of all replies in each bin, those that ended by themselves and those that were cut."""
    ended = np.histogram([count for count, finished in replies if finished], edges)[0]
    cut = np.histogram([count for count, finished in replies if not finished], edges)[0]
    return ended / len(replies), cut / len(replies)


def _histogram(
    policy: str,
    place: int,
    replies: list[tuple[float, bool]],
    edges: np.ndarray,
    shares: tuple[np.ndarray, np.ndarray],
    tallest: float,
    limit: int | None,
) -> Markup:
    floor, top = HEIGHT - 38.0, 26.0
    y = axis([0.0, tallest], floor, top, ticks=3)
    x = axis([0.0, float(edges[-1])], left_margin(y, 38.0), WIDTH - 12.0)
    x = Axis(0.0, float(edges[-1]), x.start, x.end, tuple(t for t in x.ticks if t <= edges[-1]))
    parts = frame(x, y, "tokens per reply", "", y_label=lambda t: percent(t, 0))
    colour = svg.series(place)
    for left, right, ended, cut in zip(edges[:-1], edges[1:], *shares, strict=True):
        for bottom, share, kind in ((0.0, ended, "bin"), (ended, cut, "bin cut")):
            if share > 0:
                x1, x2, y1, y2 = x.at(left) + 0.6, x.at(right) - 0.6, y.at(bottom), y.at(bottom + share)
                said = f"{short(left)} to {short(right - 1)} tokens: {percent(share)}{', cut' if 'cut' in kind else ''}"
                parts.append(
                    svg.tag("rect", svg.tag("title", said), x=x1, y=y2, width=max(x2 - x1, 0.8), height=y1 - y2,
                            class_=f"{kind} {colour}")
                )  # fmt: skip
    median = float(np.median([count for count, _ in replies]))
    parts.append(svg.line(x.at(median), top, x.at(median), floor, "median"))
    right_half = median > 0.6 * x.high
    parts.append(
        svg.text(x.at(median) + (-4 if right_half else 4), top + 4, f"median {short(median)}",
                 anchor="end" if right_half else "start", class_="label")
    )  # fmt: skip
    if limit is not None:
        parts.append(svg.line(x.at(limit), top - 22, x.at(limit), floor, "limit"))
        parts.append(svg.text(x.at(limit) - 3, top - 13, f"limit {limit}", anchor="end"))
    cut = sum(not finished for _, finished in replies) / len(replies)
    words = f"{len(replies)} replies, median {short(median)} tokens, {percent(cut, 0)} cut at the limit."
    return svg.figure(WIDTH, HEIGHT, f"Reply lengths of {policy}", words, parts, kind="plot")
