"""Votes that people cast on two replies (`preftune chat --compare` writes them) as pairs: the preferred reply is the
chosen one."""

from ..errors import UserError
from ..values import is_number
from .rows import Unusable, text_message
from .sources import RawRow
from .spec import RowKind

TIE = "a vote for neither reply"
OF_EVALUATION = "a vote on the evaluation's own samples, which are not for training"

FIELDS = {"policy_a", "policy_b", "completion_a", "completion_b", "preference"}


def is_vote(raw: RawRow, kind: RowKind) -> bool:
    """Whether the row has all that a vote has; a vote serves every kind."""
    return raw.keys() >= FIELDS


def vote_as_ours(raw: RawRow, kind: RowKind, origin: str) -> RawRow:
    """The row with `prompt`, `chosen` and `rejected` for the replies and the preference; what else it has stays.

    Raises:
        UserError: the preference is no number from 1 (A's reply) to 2 (B's).
        Unusable: nobody won, or the prompt is only a place in an evaluation.
    """
    preference = raw["preference"]
    if not is_number(preference) or not 1 <= preference <= 2:
        remedy = "write 1 for completion_a, 2 for completion_b, 1.5 for neither"
        raise UserError(origin, f"preference is {preference!r}, expected a number from 1 to 2", remedy)
    if isinstance(raw.get("prompt"), int):
        raise Unusable(OF_EVALUATION)
    if preference == 1.5:
        raise Unusable(TIE)
    sides = [raw["completion_a"], raw["completion_b"]]
    for side in sides:
        if not isinstance(side, str):
            raise UserError(origin, f"a completion is {side!r}, expected text", "correct the row")
    # as messages: a reply that looks like a dialogue is still one reply
    chosen, rejected = ([text_message("assistant", side)] for side in (sides if preference < 1.5 else sides[::-1]))
    rest = {key: value for key, value in raw.items() if key not in ("completion_a", "completion_b", "preference")}
    return rest | {"chosen": chosen, "rejected": rejected}
