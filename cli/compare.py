"""Blind comparison: two policies' replies without their names, the person's vote, and the tally."""

import random
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..eval.chat.blind import Ballot, draw_pair, sample_ballots
from ..eval.chat.votes import Vote, append_vote, cast_vote, vote_ratings, vote_rows, votes_in
from ..files import EVALUATION, SAMPLES, VOTES
from ..journal import mend
from ..values import plain
from .output import Output
from .speakers import show_reply
from .terminal import Terminal

if TYPE_CHECKING:
    from ..data.rows import Message
    from ..eval.chat.conversation import Conversation

LABELS = ("A: ", "B: ")
_CHOICES = {"1": "A", "a": "A", "2": "B", "b": "B", "=": "tie", "x": "both bad", "0": None}


def open_votes(run: Path) -> list[Vote]:
    """The votes that the run already has.

    Raises:
        UserError: they cannot be read, or what stands there is no file.
    """
    file = votes_file(run)
    if file.exists() and not file.is_file():
        raise UserError(str(file), "is no file, and votes are kept there", "move it away")
    mend(file)
    return list(votes_in(file)) if file.is_file() and file.stat().st_size else []


def votes_file(run: Path) -> Path:
    """Where a run keeps its votes."""
    return run / VOTES


class Blind:
    """Two policies that answer each turn, in random order.

    Attributes:
        voter: who votes, None where nobody says so.
        cast: the number of votes so far.
    """

    def __init__(
        self,
        talk: "Conversation",
        terminal: Terminal,
        run: Path,
        policies: list[str],
        seed: str,
        voter: str | None = None,
    ) -> None:
        self.talk, self.terminal, self.run, self.policies, self.voter = talk, terminal, run, policies, voter
        self.rng = random.Random(seed)
        self.cast = 0

    def answer(self, messages: "list[Message]", seed: int) -> str | None:
        """The reply that the person prefers, or the first one shown in a tie; None if a reply was stopped."""
        pair = draw_pair(self.rng, self.policies)
        texts = []
        for label, policy in zip(LABELS, pair, strict=True):
            reply = show_reply(self.talk, self.terminal, label, policy, messages, seed)
            if reply.stopped:
                self.terminal.say("no vote, and the turn is forgotten")
                return None
            texts.append(reply.text)
        ballot = Ballot(messages, messages, pair, (texts[0], texts[1]))
        choice = ask_vote(self.terminal, ballot)
        if choice is not None:
            self.cast += cast(self.run, ballot, choice, self.voter)
            self.terminal.say(f"A was {pair[0]}, B was {pair[1]}")
        return texts[1] if choice == "B" else texts[0]

    def switch(self, name: str) -> str:
        """Not possible here: two policies answer.

        Raises:
            UserError: always.
        """
        raise UserError("/policy", "means nothing while policies are compared", f"there are {', '.join(self.policies)}")


def cast(run: Path, ballot: Ballot, choice: str, voter: str | None) -> bool:
    """Keep one vote; whether it is new: nobody who gives a name votes twice on the same two replies."""
    row = ballot.vote(choice, voter)
    if voter is not None:
        return cast_vote(votes_file(run), row)
    append_vote(votes_file(run), row)
    return True


def vote_on_samples(run: Path, policies: list[str], seed: int, terminal: Terminal, voter: str | None = None) -> None:
    """Ask for votes on the evaluation's samples that have none yet, then show the tally.

    Which policy wrote which reply is not said before: somebody who knows how a policy writes no longer votes blind.

    Raises:
        UserError: there are no samples, none of such a policy, or the votes were cast on other samples.
    """
    ballots = sample_ballots(run / EVALUATION / SAMPLES, policies, open_votes(run), seed, voter)
    if terminal.person:
        terminal.say(f"{len(ballots)} pairs of replies to vote on; Ctrl-D ends, and the next time goes on")
    kept = 0
    try:
        for number, ballot in enumerate(ballots, 1):
            _show(ballot, f"[{number} of {len(ballots)}]", terminal)
            choice = ask_vote(terminal, ballot)
            if choice is not None:
                kept += cast(run, ballot, choice, voter)
    except (EOFError, KeyboardInterrupt):
        if terminal.person:
            terminal.end()
    show_tally(run, policies, kept)


def _show(ballot: Ballot, head: str, terminal: Terminal) -> None:
    terminal.begin(f"\n{head}\n" if terminal.person else "")
    parts = [f"{message['role']}: {message.get('content') or ''}" for message in ballot.messages]
    parts += [label + text.strip() for label, text in zip(LABELS, ballot.completions, strict=True)]
    terminal.write("\n".join(parts))
    terminal.end()


def ask_vote(terminal: Terminal, ballot: Ballot) -> str | None:
    """One of `CHOICES`, None to skip. Two equal replies are a tie without asking.

    Raises:
        EOFError: the person ends the chat.
    """
    if ballot.same:
        terminal.say("the same reply twice: a tie")
        return "tie"
    while True:
        said = terminal.ask("better: 1 (A), 2 (B), = (neither), x (both bad), 0 (skip)? ").strip().lower()
        if said == "/quit":
            raise EOFError
        if said in _CHOICES:
            return _CHOICES[said]
        terminal.say(f"{said!r} is no vote: 1 for A, 2 for B, = for neither, x for both bad, 0 to skip, /quit to end")


def show_tally(run: Path, policies: list[str], cast: int) -> None:
    """Print the votes on these policies, old and new: win-rates, and ratings if there are more than two policies."""
    output, file = Output(), votes_file(run)
    votes = [vote for vote in open_votes(run) if set(vote.policies) <= set(policies)]
    output.say(f"\nvotes on {', '.join(policies)} in {file}: {len(votes)}, {cast} of them now")
    output.rows(vote_rows(votes))
    if len({policy for vote in votes for policy in vote.policies}) > 2:
        output.say("\nratings: Bradley-Terry log-odds of mean 0, with 95% intervals over prompts")
        output.rows(
            plain({"policy": policy, "rating": each.log_odds, "low": each.low, "high": each.high})
            for policy, each in vote_ratings(votes).items()
        )
