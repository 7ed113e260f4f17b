"""Where people vote: what each sees next, and what becomes of a vote. Knows nothing of the page."""

import secrets
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ...eval.chat.blind import Ballot, sample_ballots
from ...eval.chat.labels import Labelling
from ...eval.chat.votes import cast_vote, voter_name
from ...files import EVALUATION, SAMPLES
from ..compare import open_votes, votes_file


class Source(Protocol):
    """Where ballots come from."""

    def ballots(self, voter: str, policies: list[str]) -> tuple[list[Ballot], int]:
        """What is left for a person to vote on, in their order; and to how many prompts replies are still to come."""
        ...

    def voted(self) -> None:
        """A vote was cast."""
        ...


@dataclass(frozen=True)
class Samples:
    """The evaluation's replies."""

    run: Path
    seed: int

    def ballots(self, voter: str, policies: list[str]) -> tuple[list[Ballot], int]:
        """Every pair of the policies on every prompt, but what the person voted on."""
        return sample_ballots(self.run / EVALUATION / SAMPLES, policies, open_votes(self.run), self.seed, voter), 0

    def voted(self) -> None:
        """Nothing more is written."""


@dataclass(frozen=True)
class Labels:
    """The replies of a labelling."""

    labelling: Labelling

    def ballots(self, voter: str, policies: list[str]) -> tuple[list[Ballot], int]:
        """What was drawn and the person did not vote on."""
        drawn = self.labelling.drawn()
        coming = {wish.prompt for wish in self.labelling.missing(drawn)}
        return list(self.labelling.ballots(voter, drawn)), len(coming)

    def voted(self) -> None:
        """Writes the pairs."""
        self.labelling.write_pairs()


@dataclass
class Seat:
    """One person at the page.

    Attributes:
        voter: their name; empty before they gave one.
        ballot: what they see; `mark` names it, so that a vote is on what was seen and on nothing else.
        left: ballots left with this one. coming: prompts to which replies are still to come. cast: votes cast here.
        skipped: ballots not to show again for now.
        alike: ties that nobody was asked about.
    """

    voter: str = ""
    ballot: Ballot | None = None
    mark: str = ""
    left: int = 0
    coming: int = 0
    cast: int = 0
    alike: int = 0
    skipped: set[str] = field(default_factory=set)

    def show(self, ballot: Ballot | None, left: int = 0) -> None:
        """Have the person see that ballot."""
        self.ballot, self.left = ballot, left
        self.mark = "" if ballot is None else secrets.token_hex(6)


class Booth:
    """Votes of a run."""

    def __init__(self, run: Path) -> None:
        self.run, self._lock = run, threading.Lock()

    def sit(self, seat: Seat, said: str) -> bool:
        """Give the seat to a person; whether what they said is a name."""
        name = voter_name(said)
        if name is None:
            return False
        if name != seat.voter:
            seat.voter, seat.cast, seat.alike = name, 0, 0
            seat.skipped.clear()
        seat.show(None)
        return True

    def next(self, seat: Seat, source: Source, policies: list[str]) -> None:
        """Show the next ballot; two equal replies are a tie without asking."""
        ballots, seat.coming = source.ballots(seat.voter, policies)
        for each in ballots:
            if each.same:
                seat.alike += cast_vote(votes_file(self.run), each.vote("tie", seat.voter))
        ballots = [each for each in ballots if not each.same]
        fresh = [each for each in ballots if _name(each) not in seat.skipped]
        if not fresh and ballots:
            # what was skipped comes again once nothing else is left
            seat.skipped.clear()
            fresh = ballots
        seat.show(fresh[0] if fresh else None, len(ballots))

    def take(self, seat: Seat, mark: str) -> Ballot | None:
        """The ballot of that mark, once: what is pressed twice, or was pressed before it was seen, gets none."""
        with self._lock:
            if seat.ballot is None or not mark or mark != seat.mark:
                return None
            seat.mark = ""
            return seat.ballot

    def vote(self, seat: Seat, ballot: Ballot, choice: str, source: Source | None) -> bool:
        """Keep a vote on a ballot that was taken; whether it is new."""
        kept = cast_vote(votes_file(self.run), ballot.vote(choice, seat.voter))
        seat.cast += kept
        if source is not None:
            source.voted()
        return kept

    def skip(self, seat: Seat, ballot: Ballot) -> None:
        """Show a ballot no more until the others are done."""
        seat.skipped.add(_name(ballot))


def _name(ballot: Ballot) -> str:
    return str((ballot.prompt, sorted(zip(ballot.policies, ballot.completions, strict=True))))
