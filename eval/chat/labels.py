"""Replies drawn to one's own prompts, for people to choose from, and the preference pairs that come of it.

Beside the votes of a run lie two files of each labelling:

    RUN/NAME.replies.jsonl   every reply that was drawn: whose it is, the hash of its adapter, how it was drawn
    RUN/NAME.pairs.jsonl     prompt, chosen and rejected, for a stage's `data:`; both replies' lineage; who voted

A pair is there where more people prefer one of its replies than the other. It is made anew from votes.jsonl after each
vote, which is where votes are kept.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from ...data.rows import Message
from ...errors import UserError
from ...files import VOTES, read_json_lines, write_whole
from ...journal import alone_with, append_line
from .blind import Ballot, person_seed
from .votes import messages_key


@dataclass(frozen=True)
class Wish:
    """A reply that is to be drawn: the `number`-th of a policy, which has that adapter, to a prompt."""

    prompt: str
    policy: str
    adapter: str | None
    number: int


@dataclass(frozen=True)
class Labelling:
    """The prompts of a file, and how replies to them are drawn.

    Attributes:
        run: the run's folder.
        name: of its files there.
        prompts: key -> messages, in the file's order; a prompt that stands there twice is there once.
        policies: name -> hash of its adapter, None for the base.
        replies: so many of each policy to each prompt.
        sampling: what else shapes a reply: temperature, max_new_tokens, beams, seed.
        base: of the policies, as lineage says it.
    """

    run: Path
    name: str
    prompts: Mapping[str, list[Message]]
    policies: Mapping[str, str | None]
    replies: int
    sampling: Mapping[str, Any]
    base: Mapping[str, Any] = field(default_factory=dict)

    @property
    def replies_file(self) -> Path:
        """Where the drawn replies are kept."""
        return self.run / f"{self.name}.replies.jsonl"

    @property
    def pairs_file(self) -> Path:
        """Where the pairs are written."""
        return self.run / f"{self.name}.pairs.jsonl"

    def check_places(self) -> None:
        """Raises UserError where one of the files is something else than this labelling's."""
        for file in (self.replies_file, self.pairs_file):
            if file.exists() and not file.is_file():
                raise UserError(str(file), "is no file, and the labelling is kept there", "move it away")
            if any(row.get("labelling") != self.name for row in read_json_lines(file)):
                raise UserError(str(file), "holds rows that no labelling wrote", "move it away, or rename the prompts")

    def wishes(self) -> list[Wish]:
        """All replies of the labelling, prompt by prompt."""
        return [
            Wish(prompt, policy, adapter, number)
            for prompt in self.prompts
            for policy, adapter in self.policies.items()
            for number in range(self.replies)
        ]

    def drawn(self) -> dict[Wish, str]:
        """The replies that were drawn so far with these adapters and settings."""
        wished, found = set(self.wishes()), dict[Wish, str]()
        for row in read_json_lines(self.replies_file):
            if row.get("sampling") != dict(self.sampling) or not isinstance(row.get("prompt"), list):
                continue
            key = messages_key(row["prompt"])
            wish = Wish(key, str(row.get("policy")), row.get("adapter_sha256"), int(row.get("number", 0)))
            if wish in wished:
                found.setdefault(wish, str(row.get("completion")))
        return found

    def missing(self, drawn: Mapping[Wish, str]) -> list[Wish]:
        """The replies that are still to be drawn, prompt by prompt."""
        return [wish for wish in self.wishes() if wish not in drawn]

    def seed_of(self, wish: Wish) -> int:
        """Of the reply's random stream: another for each prompt and number, whatever else stands in the file."""
        return _hashed(self.sampling.get("seed"), wish.prompt, wish.number) % (1 << 31)

    def keep(self, wish: Wish, completion: str, finished: bool) -> None:
        """Write down a reply that was drawn."""
        row = {
            "prompt": self.prompts[wish.prompt],
            "completion": completion,
            "finished": finished,
            "policy": wish.policy,
            "adapter_sha256": wish.adapter,
            "base": dict(self.base),
            "number": wish.number,
            "sampling": dict(self.sampling),
            "stream": self.seed_of(wish),
            "drawn": datetime.now(UTC).isoformat(timespec="seconds"),
            "labelling": self.name,
        }
        with alone_with(self.replies_file):
            append_line(self.replies_file, row)

    def ballots(self, voter: str, drawn: Mapping[Wish, str] | None = None) -> "Iterator[Ballot]":
        """What there is for a person to vote on now, in an order of their own; what they voted on is left out.

        Args:
            drawn: the replies that there are; None reads them.

        With several policies the n-th reply of each is set against the n-th of every other. With one, of two replies
        the better stays and meets the next: n - 1 votes a prompt.
        """
        drawn, voted = self.drawn() if drawn is None else drawn, self._votes_of(voter)
        seed = person_seed(int(self.sampling.get("seed") or 0), voter)
        by_prompt: dict[str, dict[Wish, str]] = {}
        for wish, text in drawn.items():
            by_prompt.setdefault(wish.prompt, {})[wish] = text
        ready = [each for each, found in by_prompt.items() if len(found) == len(self.policies) * self.replies]
        for prompt in sorted(ready, key=lambda each: _hashed(seed, each)):
            mine = by_prompt[prompt]
            pairs = self._bouts(mine, voted) if len(self.policies) > 1 else self._winner_stays(mine, voted, seed)
            for pair in pairs:
                yield self._ballot(pair, mine, seed)

    def _bouts(self, replies: Mapping[Wish, str], voted: "_Voted") -> "Iterator[tuple[Wish, Wish]]":
        for first, second in combinations(replies, 2):
            apart = first.policy != second.policy and first.number == second.number
            if apart and _sides(first, replies[first], second, replies[second]) not in voted:
                yield first, second

    def _winner_stays(
        self, replies: Mapping[Wish, str], voted: "_Voted", seed: int | str
    ) -> "Iterator[tuple[Wish, Wish]]":
        """At most one pair: whom it is between depends on the vote before."""
        distinct = {text: wish for wish, text in reversed(list(replies.items()))}
        order = sorted(distinct.values(), key=lambda wish: _hashed(seed, wish.prompt, wish.number))
        for best, other in _meetings(order, replies, voted):
            if _sides(best, replies[best], other, replies[other]) not in voted:
                yield best, other
                return

    def _ballot(self, pair: tuple[Wish, Wish], replies: Mapping[Wish, str], seed: int | str) -> Ballot:
        a, b = pair if _hashed(seed, *(replies[each] for each in sorted(pair, key=str))) % 2 else pair[::-1]
        messages = self.prompts[a.prompt]
        extra = {"labelling": self.name, "adapter_a": a.adapter, "adapter_b": b.adapter}
        return Ballot(messages, messages, (a.policy, b.policy), (replies[a], replies[b]), extra)

    def _votes_of(self, voter: str) -> "_Voted":
        """Sides -> the text that the person prefers, None for neither."""
        found: _Voted = {}
        for row in self._rows():
            if row.get("voter") == voter:
                a, b = _reply(row, "a"), _reply(row, "b")
                better = {1.0: a, 2.0: b}.get(float(row["preference"]))
                found[messages_key(row["prompt"]), frozenset((a, b))] = None if better is None else better[2]
        return found

    def _rows(self) -> list[dict[str, Any]]:
        """This labelling's votes."""
        return [row for row in read_json_lines(self.run / VOTES) if row.get("labelling") == self.name]

    def write_pairs(self) -> int:
        """Write the pairs of the votes so far; how many there are."""
        with alone_with(self.pairs_file):
            pairs = self.pairs()
            text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in pairs)
            if pairs or self.pairs_file.exists():
                write_whole(self.pairs_file, text.encode("utf-8", "replace").decode("utf-8"))
        return len(pairs)

    def pairs(self) -> list[dict[str, Any]]:
        """A row for every two replies of which more people prefer one than the other."""
        votes: dict[tuple[str, frozenset[_Reply]], list[dict[str, Any]]] = {}
        for row in self._rows():
            sides = frozenset((_reply(row, "a"), _reply(row, "b")))
            votes.setdefault((messages_key(row["prompt"]), sides), []).append(row)
        lineage = self._lineage()
        rows = []
        for (prompt, _), cast in votes.items():
            wins = Counter(better for row in cast if (better := _better(row)) is not None)
            first, second = _reply(cast[0], "a"), _reply(cast[0], "b")
            if wins[first] == wins[second]:
                continue
            chosen, rejected = (first, second) if wins[first] > wins[second] else (second, first)
            rows.append(
                {
                    "prompt": cast[0]["prompt"],
                    "chosen": [{"role": "assistant", "content": chosen[2]}],
                    "rejected": [{"role": "assistant", "content": rejected[2]}],
                    "chosen_by": lineage.get((prompt, *chosen), _by(chosen)),
                    "rejected_by": lineage.get((prompt, *rejected), _by(rejected)),
                    "votes": [_said(row, chosen) for row in cast],
                    "labelling": self.name,
                }
            )
        return rows

    def _lineage(self) -> dict[tuple[str, str, str | None, str], dict[str, Any]]:
        """(prompt, policy, adapter, text) -> what is known of the reply."""
        kept = ("policy", "adapter_sha256", "base", "sampling", "stream", "drawn", "finished")
        found: dict[tuple[str, str, str | None, str], dict[str, Any]] = {}
        for row in read_json_lines(self.replies_file):
            key = (messages_key(row["prompt"]), row["policy"], row["adapter_sha256"], row["completion"])
            found.setdefault(key, {name: row.get(name) for name in kept})
        return found


_Reply = tuple[str, str | None, str]
"""policy, hash of its adapter, text"""
_Voted = dict[tuple[str, frozenset[_Reply]], str | None]


def _meetings(order: Sequence[Wish], replies: Mapping[Wish, str], voted: _Voted) -> Iterator[tuple[Wish, Wish]]:
    """Who meets whom where the better one stays, as far as the votes reach; the one that stood stays after a tie."""
    if not order:
        return
    best = order[0]
    for other in order[1:]:
        yield best, other
        if voted.get(_sides(best, replies[best], other, replies[other])) == replies[other]:
            best = other


def _sides(first: Wish, text: str, second: Wish, other: str) -> tuple[str, frozenset[_Reply]]:
    return first.prompt, frozenset(((first.policy, first.adapter, text), (second.policy, second.adapter, other)))


def _reply(row: Mapping[str, Any], side: str) -> _Reply:
    return row[f"policy_{side}"], row.get(f"adapter_{side}"), row[f"completion_{side}"]


def _better(row: Mapping[str, Any]) -> _Reply | None:
    return {1.0: _reply(row, "a"), 2.0: _reply(row, "b")}.get(float(row["preference"]))


def _by(reply: _Reply) -> dict[str, Any]:
    return {"policy": reply[0], "adapter_sha256": reply[1]}


def _said(row: Mapping[str, Any], chosen: _Reply) -> dict[str, Any]:
    """Who voted what on a pair, and when."""
    better = _better(row)
    word = "both bad" if row.get("both_bad") else "neither"
    if better is not None:
        word = "chosen" if better == chosen else "rejected"
    return {"voter": row.get("voter"), "prefers": word, "cast": row.get("cast")}


def _hashed(*parts: object) -> int:
    """A number that is the same for the same parts, in every process."""
    text = json.dumps([str(each) for each in parts])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8])
