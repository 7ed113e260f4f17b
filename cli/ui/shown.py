"""The page's own pieces of HTML: everything that a model, a person or a file said becomes text in them."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from ...data.rows import Message
from ...errors import UserError
from ...eval.chat.votes import vote_rows
from ...eval.report import text
from ...eval.report.curves import EVERY_PANEL, stage_curves
from ...eval.report.page import TEMPLATES
from ...eval.report.read import read_run
from ...files import LOG, REPORT, RUN_STATE, VOTES
from ...progress import duration
from ..compare import open_votes
from ..status import DONE, FAILED, INTERRUPTED, RUNNING, status_of
from .booth import Seat

PARTS = Path(__file__).with_name("parts")
_BADGES = {DONE: "ok", RUNNING: "look", FAILED: "broken", INTERRUPTED: "broken"}


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader([PARTS, TEMPLATES]), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    made.filters.update(short=text.short, percent=text.percent, duration=duration)
    made.globals.update(percents=text.percents)
    return made


def _part(name: str, **values: Any) -> str:
    return _environment().get_template(f"{name}.html.j2").render(**values)


def head() -> str:
    """What stands in the page's head: the report's style for what it has of the report, ours, and the keys."""
    report = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    found = re.search(r":root \{.*?\}", report, re.S)
    colours = "" if found is None else found[0]
    ours = (PARTS / "ui.css").read_text(encoding="utf-8")
    keys = (PARTS / "ui.js").read_text(encoding="utf-8")
    # nested: of the report's rules those alone apply that are about what lies within one of our pieces
    return f"<style>{colours}\n.pf {{ {report} }}\n{ours}</style><script>{keys}</script>"


def top(title: str) -> str:
    """The page's heading."""
    return _part("top", title=title)


def states(run: Path) -> str:
    """The run's stages: how far each is, and its last numbers."""
    try:
        status = status_of(run)
    except (UserError, OSError) as error:
        return _part("trouble", said=str(error))
    rows = [(each, each.row(), _BADGES.get(each.state, "tie")) for each in status.steps]
    return _part("states", status=status, rows=rows, report=(run / REPORT).is_file())


def curves(run: Path) -> str:
    """What the stages logged, drawn as in the report."""
    return _curves(run, _mark(run / RUN_STATE, *run.glob(f"*/{LOG}"), *run.glob(f".*/{LOG}")))


def tally(run: Path) -> str:
    """The votes so far."""
    return _tally(run, _mark(run / VOTES))


def _mark(*files: Path) -> tuple[object, ...]:
    """Another one where one of the files was written since: what is read of them need not be read each time."""
    found: list[object] = []
    for file in sorted(files):
        with suppress(OSError):
            stat = file.stat()
            found.append((str(file), stat.st_ino, stat.st_mtime_ns, stat.st_size))
    return tuple(found)


@lru_cache(maxsize=2)
def _curves(run: Path, mark: tuple[object, ...]) -> str:
    try:
        stages = read_run(run).stages
    except (UserError, OSError):
        return ""  # nothing is there yet
    drawn = [(s, stage_curves(s.log, EVERY_PANEL if s.record is None else s.record.panels)[0]) for s in stages]
    return _part("drawn", it=[(stage, main) for stage, main in drawn if main])


@lru_cache(maxsize=2)
def _tally(run: Path, mark: tuple[object, ...]) -> str:
    try:
        votes = open_votes(run) if mark else []
    except (UserError, OSError) as error:
        return _part("trouble", said=str(error))
    voters = {vote.voter for vote in votes}
    return _part("tally", votes=votes, voters=len(voters), rows=vote_rows(votes)) if votes else ""


def ballot(seat: Seat) -> str:
    """What a person votes on."""
    return _part("ballot", ballot=seat.ballot, mark=seat.mark, spoken=spoken) if seat.ballot is not None else ""


def notice(said: str, *, trouble: bool = False) -> str:
    """One line for the person."""
    return _part("trouble", said=said) if trouble else str(Markup("<p>{}</p>").format(said)) if said else ""


def dialogue(policy: str, turns: Sequence[Message], pending: bool = False) -> str:
    """A conversation with a policy."""
    return _part("dialogue", policy=policy, turns=[spoken(turn) for turn in turns], pending=pending)


def spoken(message: Message) -> Mapping[str, str]:
    """Who says what in a message."""
    content = message.get("content")
    return {"role": str(message.get("role")), "text": content if isinstance(content, str) else str(content or "")}
