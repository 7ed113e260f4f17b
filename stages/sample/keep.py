"""Which replies become rows, and how they are written: plain functions of texts and scores.

Rows are in our own fields (`data/formats.py`), as messages, so that a later stage lays them out by the chat template as
it does a user's data.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...data.formats import normalise
from ...data.rows import Row, text_message
from ...data.spec import OUR_COLUMNS, RowKind
from ...errors import UserError
from .settings import ALL, BEST, BEST_WORST, SampleSettings

UNFINISHED = "replies that did not end"
EMPTY = "replies without text"
UNSCORED = "replies without a score"
TOO_FEW = "prompts with fewer than two replies to choose from"
EQUAL = "prompts whose replies all score the same"
WITHIN_MARGIN = "prompts whose scores differ by no more than the margin"
NONE_LEFT = "prompts without a reply to keep"
BELOW = "replies below the threshold"
REPEATED = "replies that an earlier one to the same prompt repeats"

_OURS = {*OUR_COLUMNS, "score", "score_chosen", "score_rejected", "finished", "length", "draw"}
"""Names that rows have for what is written here."""


@dataclass(frozen=True)
class Reply:
    """One reply to a prompt.

    Attributes:
        draw: its place among those to its prompt.
        text: without special tokens.
        score: None where no source had one.
        length: tokens, EOS included.
        finished: whether it ended by itself.
    """

    draw: int
    text: str
    score: float | None
    length: int
    finished: bool

    def as_dict(self) -> dict[str, Any]:
        """As it is kept until the stage is done."""
        return asdict(self)


@dataclass(frozen=True)
class Kept:
    """Of one prompt: the rows that were made of its replies, the replies in them, and what was left out by reason."""

    rows: list[dict[str, Any]]
    replies: list[Reply]
    left_out: Counter[str]


def keep(prompt: Row, replies: Sequence[Reply], settings: SampleSettings) -> Kept:
    """The rows of one prompt.

    A reply that did not end, has no text or no score is not chosen from. Ties go to the reply that was drawn first.

    Args:
        replies: in the order in which they were drawn.
    """
    left_out: Counter[str] = Counter()
    everything = settings.keep == ALL and settings.threshold is None
    fit = [each for each in replies if everything or _fits(each, settings, left_out)]
    scored = [(each.score, each) for each in fit if each.score is not None]
    if settings.keep == BEST_WORST:
        pair = _pair(scored, settings.margin, left_out)
        return Kept([] if pair is None else [_pair_row(prompt, *pair)], list(pair or ()), left_out)
    if settings.keep == BEST:
        chosen = [max(scored, key=lambda each: each[0])[1]] if scored else []
    elif settings.keep == ALL:
        chosen = fit
    else:
        chosen = _above(scored, settings.threshold or 0.0, left_out)
    if not chosen:
        left_out[NONE_LEFT] += 1
    return Kept([_reply_row(prompt, each, settings) for each in chosen], chosen, left_out)


def _fits(reply: Reply, settings: SampleSettings, left_out: Counter[str]) -> bool:
    reasons = {
        UNFINISHED: not reply.finished and settings.unfinished == "drop",
        EMPTY: not reply.text.strip(),
        UNSCORED: reply.score is None,
    }
    why = next((reason for reason, holds in reasons.items() if holds), None)
    if why is not None:
        left_out[why] += 1
    return why is None


def _pair(scored: Sequence[tuple[float, Reply]], margin: float, left_out: Counter[str]) -> tuple[Reply, Reply] | None:
    """The best and the worst; None where one is not better than the other by more than the margin."""
    if len(scored) < 2:
        left_out[TOO_FEW] += 1
        return None
    (most, best), (least, worst) = max(scored, key=lambda each: each[0]), min(scored, key=lambda each: each[0])
    if most == least or best.text == worst.text:
        left_out[EQUAL] += 1
        return None
    if not most - least > margin:
        left_out[WITHIN_MARGIN] += 1
        return None
    return best, worst


def _above(scored: Sequence[tuple[float, Reply]], threshold: float, left_out: Counter[str]) -> list[Reply]:
    """Those that score enough, each text once."""
    found: dict[str, Reply] = {}
    for score, reply in scored:
        if score < threshold:
            left_out[BELOW] += 1
        elif reply.text in found:
            left_out[REPEATED] += 1
        else:
            found[reply.text] = reply
    return list(found.values())


def kept_columns(prompt: Row) -> dict[str, Any]:
    """The prompt's other columns that its rows have too: not those whose names say something else in them."""
    return {name: value for name, value in prompt.columns.items() if name not in _OURS}


def _start(prompt: Row) -> dict[str, Any]:
    return {"prompt": prompt.prompt, **({} if prompt.tools is None else {"tools": prompt.tools})}


def _said(text: str) -> list[dict[str, Any]]:
    return [text_message("assistant", text)]


def _pair_row(prompt: Row, chosen: Reply, rejected: Reply) -> dict[str, Any]:
    """No `margin`: reward stages would train on it."""
    return {
        **_start(prompt),
        "chosen": _said(chosen.text),
        "rejected": _said(rejected.text),
        "score_chosen": chosen.score,
        "score_rejected": rejected.score,
        **kept_columns(prompt),
    }


def _reply_row(prompt: Row, reply: Reply, settings: SampleSettings) -> dict[str, Any]:
    row = {**_start(prompt), "completion": _said(reply.text), "score": reply.score}
    if settings.keep == ALL:
        row |= {"draw": reply.draw, "length": reply.length, "finished": reply.finished}
    if settings.keep == ALL and settings.threshold is not None and reply.score is not None:
        row["label"] = reply.score >= settings.threshold
    return {**row, **kept_columns(prompt)}


def check_read_back(prompts: Iterable[Row], settings: SampleSettings, kinds: Sequence[RowKind], where: str) -> None:
    """Rows are read as what they were written as, whatever columns the prompts bring; before any is drawn.

    Raises:
        UserError: a column makes another format of them.
    """
    seen: set[frozenset[str]] = set()
    for prompt in prompts:
        names = frozenset(prompt.columns)
        if names in seen or not kinds:
            continue
        seen.add(names)
        good, bad = Reply(0, "good", 1.0, 1, True), Reply(1, "bad", 0.0, 1, True)
        row = _pair_row(prompt, good, bad) if settings.keep == BEST_WORST else _reply_row(prompt, good, settings)
        if not _reads_back(row, prompt, kinds[0]):
            culprits = [name for name in kept_columns(prompt) if _reads_back(_without(row, name), prompt, kinds[0])]
            said = f"its column {culprits[0]!r}" if culprits else f"its columns {', '.join(sorted(names))}"
            remedy = "rename it, or leave it out of the data"
            raise UserError(f"{where} ({prompt.origin})", f"{said} would make another format of sampled rows", remedy)


def _without(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


def _reads_back(row: dict[str, Any], prompt: Row, kind: RowKind) -> bool:
    try:
        found = normalise(row, kind, prompt.origin)
    except Exception:  # whatever a reader of another format meets in it
        return False
    reply = [each.chosen or each.completion for each in found]
    return len(found) == 1 and found[0].prompt == prompt.prompt and reply == [row.get("chosen") or row["completion"]]


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that there are; None where there are none."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
