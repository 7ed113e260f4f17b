"""People's votes as a judge: `{kind: human, votes: FILE}` (`chat/votes.py` has the file's format).

A vote on a place in the evaluation must be on the evaluation's own replies. A vote on a conversation is taken where the
evaluation has that prompt with those replies; the others, cast in a chat, say nothing of these samples and are counted.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ...progress import say
from ..chat.votes import Vote, check_place, messages_key, read_votes
from ..samples import Sample
from .judge import JudgePlan
from .kinds import Entry
from .names import judge_name


@dataclass(frozen=True)
class HumanJudge:
    """Votes on pairs of replies. Several votes on one pair are averaged, so that a prompt counts once."""

    name: str
    votes: tuple[Vote, ...]

    def check(self, samples: Mapping[str, Sequence[Sample]]) -> None:
        """Says how many votes are on none of these replies.

        Args:
            samples: policy -> its replies to the same prompts.

        Raises:
            UserError: there are votes on these policies and all of them are on something else.
        """
        ours = [vote for vote in self.votes if all(policy in samples for policy in vote.policies)]
        places = _places(next(iter(samples.values()), ()))
        missed = sum(_place(vote, places, [samples[policy] for policy in vote.policies]) is None for vote in ours)
        if not ours:
            say(f"{self.name}: none of the {len(self.votes)} votes is on two of these policies")
        if missed and missed == len(ours):
            raise UserError(
                self.votes[0].origin.rsplit(":", 1)[0],
                f"none of its {missed} votes is on a prompt and replies of this evaluation",
                "vote on its samples: preftune chat RUN --compare A,B --samples",
            )
        if missed:
            say(f"{self.name}: {missed} of {len(ours)} votes are on other prompts or replies, and are left out")

    def compare(self, policy: Sequence[Sample], other: Sequence[Sample]) -> list[float]:
        """The policy's outcome on each prompt, in [0, 1]; nan where nobody voted.

        Raises:
            UserError: a vote on a place that there is not, or there on another reply than the policy's.
        """
        names, places = (policy[0].policy, other[0].policy), _places(policy)
        found: list[list[float]] = [[] for _ in policy]
        for vote in self.votes:
            if set(vote.policies) != set(names):
                continue
            place = _place(vote, places, [policy if side == names[0] else other for side in vote.policies])
            if place is not None:
                found[place].append(vote.outcomes[vote.policies.index(names[0])])
        return [float(np.mean(each)) if each else float("nan") for each in found]


def _places(replies: Sequence[Sample]) -> dict[str, list[int]]:
    """The key of each prompt -> where it stands in the evaluation, several times perhaps."""
    places: dict[str, list[int]] = {}
    for place, reply in enumerate(replies):
        places.setdefault(messages_key(reply.prompt.messages), []).append(place)
    return places


def _place(vote: Vote, places: Mapping[str, list[int]], replies: Sequence[Sequence[Sample]]) -> int | None:
    """Which prompt of the evaluation the vote is on; None where it is a conversation that is not in it.

    Args:
        replies: of the vote's two policies, in its order.
    """
    if isinstance(vote.prompt, int):
        check_place(vote, [[each.completion for each in side] for side in replies])
        return vote.prompt
    for place in places.get(vote.prompt, ()):
        pairs = zip(vote.completions, replies, strict=True)
        if all(said in (None, side[place].completion) for said, side in pairs):
            return place
    return None


def plan(entry: dict[str, Any], where: str, run_dir: Path | None) -> JudgePlan:
    """Checks the recipe's entry: `votes`, a file that is looked up in the run folder and then from here.

    Raises:
        UserError: no such file, or one with a malformed vote.
    """
    named = entry.get("votes")
    if not isinstance(named, str):
        raise UserError(f"{where}.votes", f"is {named!r}, expected a file", "write votes: votes.jsonl")
    file = _votes_file(named, run_dir)
    if file is None:
        looked = ", ".join(str(place.parent) for place in _places_of_file(named, run_dir))
        raise UserError(f"{where}.votes", f"no file {named!r} (looked in {looked})", "correct the path")
    judge = HumanJudge(judge_name(entry), read_votes(file))
    return JudgePlan(judge.name, lambda adapters, tokenizer: judge)


def key_parts(entry: Entry, run_dir: Path) -> dict[str, str | None]:
    """The file of votes."""
    named = entry.get("votes")
    if not isinstance(named, str):
        return {}
    file = _votes_file(named, run_dir)
    return {f"files of {named}": None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()}


def _votes_file(named: str, run_dir: Path | None) -> Path | None:
    return next((place for place in _places_of_file(named, run_dir) if place.is_file()), None)


def _places_of_file(named: str, run_dir: Path | None) -> list[Path]:
    return [folder / Path(named).expanduser() for folder in (run_dir, Path()) if folder is not None]
