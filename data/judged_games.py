"""Verdicts of a model that saw both replies in both orders: Arena-Hard's games and MT-bench's pairwise judgments.

Both files hold verdicts and not the replies, so that they can be counted and not trained on.

- Arena-Hard: `model`, `games`: [{`score`: A>>B, A>B, A=B, B>A or B>>A}, ...]. The baseline is A in the first game and B
  in the second. A strong verdict counts as any other.
- MT-bench: `model_1`, `model_2`, `g1_winner`, `g2_winner`: model_1, model_2, tie or error, whatever the order was.

A question counts half of each game, as everywhere in this package; MT-bench's own table makes a tie of a win and a tie.
"""

import re
from typing import Any

from ..errors import UserError
from .compared import ComparedFormat, Comparison, both_orders, has_fields, read_id, read_name, said_nothing, verdict
from .rows import RawRow

_GRADE = re.compile(r"\[*([AB])(>>|>|=|<<|<)([AB])\]*")
_WINNERS = {"model_1": 0.0, "model_2": 1.0, "tie": 0.5}


def read_arena_hard(raw: RawRow, origin: str) -> Comparison:
    """One question: the baseline first.

    Raises:
        UserError: no games, or a score that is no verdict of Arena-Hard's.
    """
    games = raw["games"]
    if not isinstance(games, list) or not 1 <= len(games) <= 2:
        raise UserError(origin, f"games is {games!r}, expected one game or two", "correct the row")
    for_b = [_grade(game, origin) for game in games]
    names = (read_name(raw, "baseline", origin), read_name(raw, "model", origin))
    prompt = read_id(raw, ("question_id", "uid", "id"), origin)
    if len(for_b) == 1:
        return Comparison(prompt, names, for_b[0])
    swapped = None if for_b[1] is None else 1.0 - for_b[1]
    return Comparison(prompt, names, both_orders(for_b[0], swapped))


def _grade(game: Any, origin: str) -> float | None:
    """The preference for B."""
    score = game.get("score") if isinstance(game, dict) else game
    if said_nothing(score):
        return None
    found = _GRADE.fullmatch("".join(score.split()).upper()) if isinstance(score, str) else None
    if found is None or found[1] == found[3]:
        raise UserError(origin, f"score is {score!r}, expected A>>B, A>B, A=B, B>A or B>>A", "correct the row")
    if found[2] == "=":
        return 0.5
    better = found[1] if found[2].startswith(">") else found[3]
    return float(better == "B")


def read_mt_bench(raw: RawRow, origin: str) -> Comparison:
    """One question and turn.

    Raises:
        UserError: a winner that is none of model_1, model_2, tie and error.
    """
    names = (read_name(raw, "model_1", origin), read_name(raw, "model_2", origin))
    winners = [raw.get(field) for field in ("g1_winner", "g2_winner") if field in raw]
    preferences = [verdict(winner, _WINNERS, origin, "winner of a game") for winner in winners]
    prompt = read_id(raw, ("question_id", "id"), origin)
    return Comparison(prompt, names, preferences[0] if len(preferences) == 1 else both_orders(*preferences))


ARENA_HARD = ComparedFormat(
    "Arena-Hard", has_fields(frozenset({"model", "games"})), read_arena_hard, frozenset({"games"}), baseline_first=True
)
MT_BENCH = ComparedFormat(
    "MT-bench", has_fields(frozenset({"model_1", "model_2", "g1_winner"})), read_mt_bench, frozenset({"g1_winner"})
)
