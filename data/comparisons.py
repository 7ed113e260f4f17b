"""The formats of comparisons that others collected, one record each; the first that recognises a row reads it."""

from .alpaca_eval import ALPACA_EVAL
from .arena import ARENA
from .compared import ComparedFormat
from .judged_games import ARENA_HARD, MT_BENCH
from .rows import RawRow

COMPARED: tuple[ComparedFormat, ...] = (ALPACA_EVAL, ARENA, ARENA_HARD, MT_BENCH)


def compared_format(raw: RawRow) -> ComparedFormat | None:
    """The format of the row; None where none knows it."""
    return next((each for each in COMPARED if each.recognises(raw, None)), None)
