"""People's votes on two replies, as `preftune chat --compare` writes them: the preferred reply is the chosen one."""

from ..errors import UserError
from ..values import is_number
from .rows import RawRow, Unusable, text_message
from .spec import RowKind

TIE = "a vote for neither reply"
BOTH_BAD = "a vote that both replies are bad"
OF_EVALUATION = "a vote on the evaluation's own samples, which are not for training"

FIELDS = {"policy_a", "policy_b", "completion_a", "completion_b", "preference"}


def is_vote(raw: RawRow, kind: RowKind) -> bool:
    """Whether the row has all fields of a vote; rows of every kind can be made from one."""
    return raw.keys() >= FIELDS


def vote_as_ours(raw: RawRow, kind: RowKind, origin: str) -> RawRow:
    """The row with the replies as `chosen` and `rejected`; `prompt` and all other fields stay.

    Raises:
        UserError: the preference is not a number from 1 (A's reply) to 2 (B's), or a reply is not text.
        Unusable: it is a tie, or the prompt is only an index into an evaluation's prompts.
    """
    preference = raw["preference"]
    if not is_number(preference) or not 1 <= preference <= 2:
        remedy = "write 1 for completion_a, 2 for completion_b, 1.5 for neither"
        raise UserError(origin, f"preference is {preference!r}, expected a number from 1 to 2", remedy)
    if isinstance(raw.get("prompt"), int):
        raise Unusable(OF_EVALUATION)
    if preference == 1.5:
        raise Unusable(BOTH_BAD if raw.get("both_bad") is True else TIE)
    sides = [raw["completion_a"], raw["completion_b"]]
    for side in sides:
        if not isinstance(side, str):
            raise UserError(origin, f"a completion is {side!r}, expected text", "correct the row")
    # as messages: a reply that looks like a dialogue is still one reply
    chosen, rejected = ([text_message("assistant", side)] for side in (sides if preference < 1.5 else sides[::-1]))
    rest = {key: value for key, value in raw.items() if key not in ("completion_a", "completion_b", "preference")}
    return rest | {"chosen": chosen, "rejected": rejected}
