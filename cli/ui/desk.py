"""What the page does when somebody does something: talks, votes, looks. Knows nothing of gradio."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...data.rows import Message, text_message
from ...errors import UserError
from ...eval.chat.blind import Ballot, draw_pair
from ...eval.chat.conversation import Reply
from ...files import EVALUATION, SAMPLES
from ...recipes.schema import BASE, Recipe
from ..policies import finished_policies
from .booth import Booth, Labels, Samples, Seat, Source
from .labelling import Drawing
from .model import Model

TYPED = "typed"
"""The name of the source of ballots that a person types prompts for."""


@dataclass
class Desk:
    """A run that is looked at, talked with and voted on.

    Attributes:
        drawing: of the labelling, where there is one.
        draws: replies drawn so far; each has a random stream of its own.
    """

    recipe: Recipe
    run: Path
    model: Model
    booth: Booth
    drawing: Drawing | None
    seed: int
    draws: int = 0

    def policies(self) -> list[str]:
        """Who can be asked now, the last one first."""
        return [*reversed(finished_policies(self.recipe, self.run)), BASE]

    def sources(self) -> dict[str, str]:
        """The name of each source of ballots -> what it is, in words."""
        found = {} if self.drawing is None else {"labels": f"prompts of {self.drawing.labelling.name}"}
        if (self.run / EVALUATION / SAMPLES).is_file():
            found["samples"] = "the evaluation's replies"
        return {**found, TYPED: "prompts that you type"}

    def source(self, name: str) -> Source | None:
        """The source of that name; None for prompts that are typed."""
        if name == "labels" and self.drawing is not None:
            return Labels(self.drawing.labelling)
        return Samples(self.run, self.seed) if name == "samples" else None

    def sampled(self) -> list[str]:
        """The policies whose replies the evaluation drew."""
        from ...eval.report.read import read_lines

        rows = read_lines(self.run / EVALUATION / SAMPLES)
        return list(dict.fromkeys(str(row["policy"]) for row in rows if "policy" in row))

    def comparable(self, source: str) -> list[str]:
        """The policies that votes of a source may be between."""
        if source == "labels" and self.drawing is not None:
            return list(self.drawing.labelling.policies)
        return self.sampled() if source == "samples" else self.policies()

    def suggested(self, source: str) -> list[str]:
        """Of those, what the page begins with: the evaluation's reference and the last policy, where there are both."""
        names = self.comparable(source)
        if source == "labels":
            return names
        reference = None if self.recipe.eval is None else self.recipe.eval.reference
        others = [name for name in names if name != reference]
        last = others[0] if source == TYPED else others[-1]
        return [reference, last] if reference in names else names[:2]

    def system(self) -> list[Message]:
        """The system message that conversations begin with."""
        said = self.model.spec.prompts.system
        return [text_message("system", said)] if said else []

    def talk(self, policy: str, turns: Sequence[Message], said: str, seed: int) -> Iterator[list[Message]]:
        """The conversation with the reply to what was said, as it grows."""
        asked = [*turns, text_message("user", said)]
        for part in self.model.stream(policy, [*self.system(), *asked], seed):
            yield [*asked, text_message("assistant", part.text if isinstance(part, Reply) else part)]

    def next_seed(self) -> int:
        """Of the next reply's random stream."""
        self.draws += 1
        return self.seed + self.draws - 1

    def ask_both(self, seat: Seat, policies: Sequence[str], said: str) -> None:
        """Have two of the policies answer a prompt, and the person see both replies without names.

        Raises:
            UserError: fewer than two policies, or as `Model.talking`.
        """
        if len(policies) < 2:
            raise UserError("policies", f"{len(policies)} chosen, and votes are between two", "choose two or more")
        pair = draw_pair(random.SystemRandom(), list(policies))
        asked, seed = [*self.system(), text_message("user", said)], self.next_seed()
        with self.model.talking(pair) as (talk, hashes):
            texts = [talk.reply(policy, asked, seed=seed).text for policy in pair]
        extra = {f"adapter_{side}": hashes[policy] for side, policy in zip("ab", pair, strict=True)}
        seat.show(Ballot(asked, asked, pair, (texts[0], texts[1]), extra), 1)
