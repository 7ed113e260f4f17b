"""Two replies to one prompt shown without names: which stands where, and the vote that comes of it."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from ...data.rows import Message
from ...data.sources import read_file
from ...errors import UserError
from ...intact import check_intact
from .votes import Vote, check_place

CHOICES: dict[str, float] = {"A": 1.0, "B": 2.0, "tie": 1.5, "both bad": 1.5}
"""What a person may choose, and the preference that it is."""


@dataclass(frozen=True)
class Ballot:
    """What a person chooses from.

    Attributes:
        prompt: what the vote says of it: its place in the evaluation, or its messages.
        messages: the conversation up to the replies.
        policies: of the reply shown as A and of the one shown as B.
        completions: theirs.
        extra: what else its votes say.
    """

    prompt: int | list[Message]
    messages: list[Message]
    policies: tuple[str, str]
    completions: tuple[str, str]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def vote(self, choice: str, voter: str | None = None) -> dict[str, Any]:
        """The line of votes.jsonl (see `votes.py`) of one of `CHOICES`.

        Args:
            voter: who chose; None: nobody says so.
        """
        (policy_a, policy_b), (completion_a, completion_b) = self.policies, self.completions
        row: dict[str, Any] = {
            "prompt": self.prompt,
            "policy_a": policy_a,
            "policy_b": policy_b,
            "preference": CHOICES[choice],
            "completion_a": completion_a,
            "completion_b": completion_b,
        }
        if choice == "both bad":
            row["both_bad"] = True
        if voter is not None:
            row["voter"] = voter
        return {**row, "cast": datetime.now(UTC).isoformat(timespec="seconds"), **self.extra}

    @property
    def same(self) -> bool:
        """Whether both replies are the same text: a tie that nobody need be asked about."""
        return self.completions[0] == self.completions[1]


def draw_pair(rng: random.Random, policies: Sequence[str]) -> tuple[str, str]:
    """Two of the policies, each pair and each order of it as likely as any other."""
    first, second = rng.sample(list(policies), 2)
    return first, second


def person_seed(seed: int, voter: str | None) -> int | str:
    """The seed of what one person sees: another order for everybody, the same one each time."""
    return seed if voter is None else f"{seed}:{voter}"


def sample_ballots(
    path: Path, policies: Sequence[str], votes: Sequence[Vote], seed: int, voter: str | None = None
) -> list[Ballot]:
    """What is left for a person to vote on of an evaluation's samples: every pair of the policies on every prompt.

    Args:
        path: its samples.jsonl.
        votes: cast already; a pair that the voter voted on at a prompt's place is left out.
        seed: with the voter it fixes the ballots' order and what stands where, which is the same however many are left.
        voter: whose votes count; None: those of which nobody said whose they are.

    Raises:
        UserError: no such file, a policy that is not in it, or votes that were cast on another evaluation's replies.
    """
    messages, replies = _read_samples(path)
    for policy in policies:
        if policy not in replies:
            remedy = f"name two of {', '.join(replies)}, or evaluate it too"
            raise UserError("--compare", f"{path} has no samples of {policy!r}", remedy)
    done = set()
    for vote in votes:
        if isinstance(vote.prompt, int) and set(vote.policies) <= set(replies):
            check_place(vote, [replies[policy] for policy in vote.policies])
            if vote.voter == voter:
                done.add((vote.prompt, frozenset(vote.policies)))
    rng = random.Random(person_seed(seed, voter))
    ballots = []
    for place, asked in enumerate(messages):
        for pair in combinations(policies, 2):
            a, b = draw_pair(rng, pair)
            ballots.append(Ballot(place, asked, (a, b), (replies[a][place], replies[b][place])))
    rng.shuffle(ballots)
    return [each for each in ballots if (each.prompt, frozenset(each.policies)) not in done]


def _read_samples(path: Path) -> tuple[list[list[Message]], dict[str, list[str]]]:
    """The prompts in their order, and policy -> its replies to them."""
    if not path.is_file():
        raise UserError(str(path), "no such file", f"evaluate first: preftune eval run {path.parent.parent}")
    check_intact(path.parent, (path.name,))
    messages: dict[int, list[Message]] = {}
    replies: dict[str, dict[int, str]] = {}
    for origin, row in read_file(path, str(path)):
        try:
            messages[row["prompt_index"]] = row["prompt"]
            replies.setdefault(row["policy"], {})[row["prompt_index"]] = row["completion"]
        except KeyError as error:
            raise UserError(origin, f"no {error.args[0]!r}", "evaluate again: it is not as written") from error
    places = list(range(len(messages)))
    for policy, said in replies.items():
        if sorted(said) != places:
            raise UserError(str(path), f"{policy!r} has not one reply to each prompt", "evaluate again")
    return [messages[i] for i in places], {policy: [said[i] for i in places] for policy, said in replies.items()}
