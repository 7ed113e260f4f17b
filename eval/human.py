"""People's votes as a judge: a JSONL file of who preferred which reply.

One vote a line:

    {"prompt": 3, "policy_a": "sft", "policy_b": "dpo", "preference": 2}

`prompt` is the prompt's place in the evaluation, counted from 0 (`prompt_index` in samples.jsonl). `preference` goes
from 1 (policy_a's reply is better) over 1.5 (neither) to 2 (policy_b's), as in annotations. Optional: `completion_a`
and `completion_b`, the replies that were voted on; where they are given they must be those of the evaluation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.errors import UserError
from ..data.sources import read_file
from .annotations import read_preference
from .samples import Sample


@dataclass(frozen=True)
class Vote:
    """One vote.

    Attributes:
        origin: the file and line.
        prompt: place of the prompt.
        policies: the two policies, a and b.
        completions: their replies, None where the vote does not carry them.
        outcomes: what a and b got: 1 and 0, or between.
    """

    origin: str
    prompt: int
    policies: tuple[str, str]
    completions: tuple[str | None, str | None]
    outcomes: tuple[float, float]


@dataclass(frozen=True)
class HumanJudge:
    """Votes on pairs of replies. Several votes on one pair are averaged, so that a prompt counts once."""

    name: str
    votes: tuple[Vote, ...]

    def compare(self, policy: Sequence[Sample], other: Sequence[Sample]) -> list[float]:
        """The policy's outcome on each prompt, in [0, 1]; nan where nobody voted.

        Raises:
            UserError: a vote on a prompt that there is not, or on another reply than the policy's.
        """
        names = (policy[0].policy, other[0].policy)
        found: list[list[float]] = [[] for _ in policy]
        for vote in self.votes:
            if set(vote.policies) != set(names):
                continue
            if vote.prompt >= len(policy):
                raise UserError(
                    vote.origin,
                    f"prompt is {vote.prompt}, and the evaluation has {len(policy)} prompts, counted from 0",
                    "vote on the prompts of this evaluation",
                )
            for side, completion in zip(vote.policies, vote.completions, strict=True):
                reply = (policy if side == names[0] else other)[vote.prompt].completion
                if completion is not None and completion != reply:
                    raise UserError(
                        vote.origin,
                        f"a vote on another reply of {side!r} than the evaluation's",
                        "evaluate with the prompts, seed and adapters that the votes were cast on, or vote again",
                    )
            found[vote.prompt].append(vote.outcomes[vote.policies.index(names[0])])
        return [float(np.mean(each)) if each else float("nan") for each in found]


def read_votes(path: Path) -> tuple[Vote, ...]:
    """The votes of a file (see the module for its format).

    Raises:
        UserError: no votes, or a field that is missing or not what it should be.
    """
    votes = tuple(_vote(row, origin) for origin, row in read_file(path, str(path)))
    if not votes:
        raise UserError(str(path), "holds no votes", "write one vote a line")
    return votes


def _vote(row: dict[str, Any], origin: str) -> Vote:
    prompt = row.get("prompt")
    if isinstance(prompt, bool) or not isinstance(prompt, int) or prompt < 0:
        remedy = "write its place in the evaluation, counted from 0"
        raise UserError(origin, f"prompt is {prompt!r}, expected a whole number", remedy)
    policies = (_text(row, "policy_a", origin), _text(row, "policy_b", origin))
    if policies[0] == policies[1]:
        raise UserError(origin, f"policy_a and policy_b are both {policies[0]!r}", "name two policies")
    completions = tuple(None if row.get(key) is None else _text(row, key, origin) for key in _COMPLETIONS)
    for_b = read_preference(row, origin) - 1.0
    return Vote(origin, prompt, policies, (completions[0], completions[1]), (1.0 - for_b, for_b))


_COMPLETIONS = ("completion_a", "completion_b")


def _text(row: dict[str, Any], name: str, origin: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise UserError(origin, f"{name} is {value!r}, expected text", f"give every vote its {name}")
    return value
