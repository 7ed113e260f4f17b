"""People's votes on pairs of replies: the file they are kept in, and their win-rates.

One vote per line:

    {"prompt": 3, "policy_a": "sft", "policy_b": "dpo", "preference": 2}

`prompt` is the prompt's place in the evaluation, counted from 0 (`prompt_index` in samples.jsonl), or the list of
messages that was answered. `preference` goes from 1 (policy_a's reply is better) over 1.5 (neither) to 2 (policy_b's),
as in annotations. Optional: `completion_a` and `completion_b`, the replies that were voted on; `both_bad`, true where
neither is better as both are bad; `voter`, who voted, and `cast`, when (UTC, ISO 8601); `labelling`, the name of the
prompts that replies were drawn to for voting on them (`labels.py`). Votes of a labelling may be on two replies of one
policy: they make pairs, and say nothing of policies.

Several programs may add votes at the same time: each does so under a lock beside the file.
"""

import math
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...data.rows import prompt_key
from ...data.sources import read_file
from ...errors import UserError
from ...files import read_json_lines
from ...journal import alone_with, append_line
from ...values import plain
from ..annotations import read_preference
from ..statistics.ratings import Rating, rate_policies
from ..statistics.winrate import win_rate


@dataclass(frozen=True)
class Vote:
    """One vote.

    Attributes:
        origin: the file and line.
        prompt: place of the prompt, or the key of its messages (`messages_key`).
        policies: the two policies, a and b.
        completions: their replies, None where the vote does not carry them.
        outcomes: what a and b got: 1 and 0, or between.
        voter: who voted; None where nobody said so.
    """

    origin: str
    prompt: int | str
    policies: tuple[str, str]
    completions: tuple[str | None, str | None]
    outcomes: tuple[float, float]
    voter: str | None = None


def messages_key(messages: Sequence[dict[str, Any]]) -> str:
    """Equal for equal conversations; fields without a value and white space around a text do not count."""
    return prompt_key([{key: value for key, value in each.items() if value is not None} for each in messages])


def read_votes(path: Path) -> tuple[Vote, ...]:
    """The votes on policies of a file (see the module for its format).

    Raises:
        UserError: no such file, no votes, or a field that is missing or not what it should be.
    """
    if not path.is_file():
        raise UserError(str(path), "no such file", "give a JSONL file of votes; preftune chat --compare writes one")
    votes = votes_in(path)
    if not votes:
        of_labelling = bool(read_json_lines(path))
        said = "each of its votes is on two replies of one policy" if of_labelling else "holds no votes"
        raise UserError(str(path), said, "vote on replies of two policies" if of_labelling else "write one a line")
    return votes


def votes_in(path: Path) -> tuple[Vote, ...]:
    """As `read_votes`; none where the file holds none on two policies."""
    return tuple(_vote(row, origin) for origin, row in read_file(path, str(path)) if not _within_one_policy(row))


def _within_one_policy(row: Mapping[str, Any]) -> bool:
    """Whether it is a labelling's vote on two replies of one policy; elsewhere a policy against itself is a mistake."""
    return isinstance(row.get("labelling"), str) and row.get("policy_a") == row.get("policy_b")


def voter_name(said: str) -> str | None:
    """A person's name as votes carry it: the same however its letters were typed; None where it is none."""
    name = " ".join(unicodedata.normalize("NFC", said).split())
    return name if 0 < len(name) <= 60 and name.isprintable() else None


def check_place(vote: Vote, replies: Sequence[Sequence[str]]) -> None:
    """Raises UserError where a vote on a place is one on another evaluation.

    Args:
        replies: the evaluation's replies of the vote's two policies, in its order.
    """
    assert isinstance(vote.prompt, int)
    if vote.prompt >= len(replies[0]):
        raise UserError(
            vote.origin,
            f"prompt is {vote.prompt}, and the evaluation has {len(replies[0])} prompts, counted from 0",
            "vote on the prompts of this evaluation",
        )
    for policy, completion, side in zip(vote.policies, vote.completions, replies, strict=True):
        if completion is not None and completion != side[vote.prompt]:
            raise UserError(
                vote.origin,
                f"a vote on another reply of {policy!r} than the evaluation's",
                "evaluate with the prompts, seed and adapters that the votes were cast on, or vote again",
            )


def append_vote(path: Path, row: Mapping[str, Any]) -> None:
    """Adds one line to the file; when this returns the vote is on disk, whatever happens to the process."""
    with alone_with(path):
        append_line(path, row)


def cast_vote(path: Path, row: Mapping[str, Any]) -> bool:
    """As `append_vote`, unless its voter has voted on these two replies to this prompt before, in whatever order.

    Returns:
        Whether it was added.
    """
    with alone_with(path):
        mine = _choice(row)
        if any(_choice(each) == mine for each in read_json_lines(path)):
            return False
        append_line(path, row)
    return True


def _choice(row: Mapping[str, Any]) -> tuple[object, ...]:
    """Equal for two votes of one person on the same two replies."""
    prompt = row.get("prompt")
    sides = sorted(str((row.get(f"policy_{side}"), row.get(f"completion_{side}"))) for side in "ab")
    return row.get("voter"), messages_key(prompt) if isinstance(prompt, list) else prompt, *sides


def vote_rows(votes: Sequence[Vote], seed: int = 0) -> list[dict[str, Any]]:
    """Win-rates of every two policies that were compared, each against the other; fractions of 1.

    Returns:
        Rows of policy, against, n (prompts), win_rate, ci_low, ci_high (95%, over prompts), ties (prompts that came out
        even). Several votes on a prompt are averaged, so that a prompt counts once.
    """
    rows = []
    for (policy, other), found in sorted(_by_pair(votes).items()):
        outcomes = np.array([float(np.mean(each)) for each in found.values()])
        for names, each in (((policy, other), outcomes), ((other, policy), 1.0 - outcomes)):
            rate = win_rate(each, seed=seed)
            numbers = {key: getattr(rate, key) for key in ("n", "win_rate", "ci_low", "ci_high", "ties")}
            rows.append(plain(dict(zip(("policy", "against"), names, strict=True)) | numbers))
    return rows


def vote_ratings(votes: Sequence[Vote], seed: int = 0) -> dict[str, Rating]:
    """Bradley-Terry ratings of all policies in the votes, best first; nan where the votes do not join them."""
    pairs = _by_pair(votes)
    prompts = list(dict.fromkeys(vote.prompt for vote in votes))
    outcomes = {
        pair: np.array([float(np.mean(found[prompt])) if prompt in found else math.nan for prompt in prompts])
        for pair, found in pairs.items()
    }
    ratings = rate_policies(sorted({policy for pair in pairs for policy in pair}), outcomes, seed=seed)
    return dict(sorted(ratings.items(), key=lambda each: -each[1].log_odds))


def _by_pair(votes: Sequence[Vote]) -> dict[tuple[str, str], dict[int | str, list[float]]]:
    """(policy, other), in the alphabet's order -> prompt -> what the policy got in each vote on it."""
    pairs: dict[tuple[str, str], dict[int | str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for vote in votes:
        first, second = sorted(vote.policies)
        pairs[first, second][vote.prompt].append(vote.outcomes[vote.policies.index(first)])
    return pairs


def _vote(row: dict[str, Any], origin: str) -> Vote:
    prompt = _prompt(row.get("prompt"), origin)
    policies = (_text(row, "policy_a", origin), _text(row, "policy_b", origin))
    if policies[0] == policies[1]:
        raise UserError(origin, f"policy_a and policy_b are both {policies[0]!r}", "name two policies")
    completions = tuple(None if row.get(key) is None else _text(row, key, origin) for key in _COMPLETIONS)
    for_b = read_preference(row, origin) - 1.0
    voter = None if row.get("voter") is None else _text(row, "voter", origin)
    return Vote(origin, prompt, policies, (completions[0], completions[1]), (1.0 - for_b, for_b), voter)


def _prompt(value: Any, origin: str) -> int | str:
    if isinstance(value, list) and value and all(isinstance(each, dict) and "role" in each for each in value):
        return messages_key(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        remedy = "write its place in the evaluation, counted from 0, or the messages"
        raise UserError(origin, f"prompt is {value!r}, expected a whole number or a list of messages", remedy)
    return value


_COMPLETIONS = ("completion_a", "completion_b")


def _text(row: dict[str, Any], name: str, origin: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise UserError(origin, f"{name} is {value!r}, expected text", f"give every vote its {name}")
    return value
