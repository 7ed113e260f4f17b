"""The page in gradio: what stands where, and what calls what of the desk."""

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from ...data.rows import Message
from ...errors import UserError
from . import shown
from .booth import Seat
from .desk import TYPED, Desk

_QUIET: Any = {"show_progress": "hidden", "api_visibility": "private"}
_FREE: Any = {**_QUIET, "concurrency_limit": 32}
_MODEL: Any = {**_QUIET, "concurrency_id": "model", "concurrency_limit": 1}
"""Of what asks the model: one at a time."""
_LOOK = 3.0
"""Seconds between two looks at the run."""
_SEEN = "(...given) => [document.querySelector('[data-ballot]')?.dataset.ballot ?? '', ...given.slice(1)]"
"""Says which ballot the person sees when a button is pressed."""


def _coming(prompts: int) -> str:
    """What is said of prompts to which replies are still to come."""
    return f"; replies to {prompts} more prompt{'s' if prompts > 1 else ''} are being drawn" if prompts else ""


def _html(value: str = "", **given: Any) -> gr.HTML:
    """A piece of the page in our own style."""
    return gr.HTML(value, apply_default_css=False, js_on_load=None, **given)


class Page:
    """One page; gradio keeps what is each person's own apart."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def build(self) -> gr.Blocks:
        """The page, ready to be served."""
        title = self.desk.recipe.name
        with gr.Blocks(title=f"{title} – preftune", analytics_enabled=False, fill_width=True) as blocks:
            _html(shown.top(title))
            with gr.Tabs(selected="vote" if self.desk.drawing is not None else "look"):
                with gr.Tab("Look", id="look"):
                    self._look(blocks)
                with gr.Tab("Talk", id="talk"):
                    self._talk(blocks)
                with gr.Tab("Vote", id="vote"):
                    self._vote(blocks)
        return blocks

    # -- look ----------------------------------------------------------------------------------------------------

    def _look(self, blocks: gr.Blocks) -> None:
        parts = [shown.states, shown.curves, shown.tally]
        boxes = [_html(elem_id=f"look-{part.__name__}") for part in parts]
        seen = gr.State([""] * len(parts))

        def look(before: list[str]) -> list[Any]:
            now = [part(self.desk.run) for part in parts]
            # what did not change is not drawn again: a reader's place and selection stay
            return [*(new if new != old else gr.skip() for new, old in zip(now, before, strict=True)), now]

        blocks.load(look, [seen], [*boxes, seen], **_FREE)
        gr.Timer(_LOOK).tick(look, [seen], [*boxes, seen], **_FREE)

    # -- talk ----------------------------------------------------------------------------------------------------

    def _talk(self, blocks: gr.Blocks) -> None:
        names = self.desk.policies()
        nobody = "nobody"
        with gr.Row():
            first = gr.Dropdown(names, value=names[0], label="Policy", elem_id="policy")
            second = gr.Dropdown([nobody, *names], value=nobody, label="Beside it", elem_id="beside")
        with gr.Row():
            left = _html(shown.dialogue(names[0], []), elem_id="left")
            right = _html(visible=False, elem_id="right")
        said = gr.Textbox(label="What you say", placeholder="Enter sends it", elem_id="say", lines=1, max_lines=6)
        with gr.Row():
            send = gr.Button("Send", variant="primary", elem_id="send")
            anew = gr.Button("New conversation", elem_id="anew")
        notice = _html(elem_id="talk-said")
        talks = gr.State({"left": [], "right": []})
        boxes = [left, right, said, notice, talks]

        def start(one: str, other: str) -> list[Any]:
            beside = gr.update(value=shown.dialogue(other, []), visible=other != nobody)
            return [shown.dialogue(one, []), beside, gr.skip(), "", {"left": [], "right": []}]

        def speak(text: str, one: str, other: str, talks: dict[str, list[Message]]) -> Iterator[list[Any]]:
            if not text.strip():
                yield [gr.skip()] * 5
                return
            sides = [("left", one)] + ([("right", other)] if other != nobody else [])
            turns, seed = dict(talks), self.desk.next_seed()
            try:
                for place, (side, policy) in enumerate(sides):
                    pending: list[Any] = [gr.skip(), gr.skip(), "", "", gr.skip()]
                    for grown in self.desk.talk(policy, talks[side], text.strip(), seed):
                        turns[side] = grown
                        pending[place] = shown.dialogue(policy, grown, pending=True)
                        yield pending
                    pending[place], pending[4] = shown.dialogue(policy, turns[side]), turns
                    yield pending
            except UserError as error:
                yield [gr.skip(), gr.skip(), text, shown.notice(str(error), trouble=True), gr.skip()]

        for box in (first, second):
            box.input(start, [first, second], boxes, **_FREE)
        anew.click(start, [first, second], boxes, **_FREE)
        gr.on([send.click, said.submit], speak, [said, first, second, talks], boxes, **_MODEL)
        fresh = lambda: [gr.update(choices=self.desk.policies()), gr.update(choices=[nobody, *self.desk.policies()])]  # noqa: E731
        blocks.load(fresh, None, [first, second], **_FREE)

    # -- vote ----------------------------------------------------------------------------------------------------

    def _vote(self, blocks: gr.Blocks) -> None:
        sources = self.desk.sources()
        chosen = next(iter(sources))
        seat = gr.State(Seat())
        with gr.Accordion("Who votes, and on what", elem_id="terms") as terms:
            with gr.Row():
                name = gr.Textbox(
                    label="Your name", placeholder="It stands beside your votes", elem_id="name", max_lines=1
                )
                source = gr.Radio(
                    [(words, key) for key, words in sources.items()], value=chosen, label="Vote on", elem_id="source"
                )
                between = gr.CheckboxGroup(label="Between", elem_id="between", **self._between(chosen))
            with gr.Row():
                begin = gr.Button("Begin", variant="primary", elem_id="begin")
        said = _html(elem_id="said")
        with gr.Row(visible=chosen == TYPED) as typed:
            prompt = gr.Textbox(label="Your prompt", elem_id="prompt", lines=1, max_lines=6, scale=4)
            ask = gr.Button("Ask both", variant="primary", elem_id="ask", scale=0)
        ballot = _html(elem_id="ballot")
        mark = gr.Textbox(visible="hidden", elem_id="mark")
        with gr.Row(visible=False, elem_id="choices") as choices:
            buttons = {
                "A": gr.Button("A is better", elem_id="vote-a"),
                "B": gr.Button("B is better", elem_id="vote-b"),
                "tie": gr.Button("Tie (=)", elem_id="vote-tie"),
                "both bad": gr.Button("Both bad (X)", elem_id="vote-bad"),
                "": gr.Button("Skip (S)", elem_id="vote-skip"),
            }
        boxes = [seat, said, ballot, choices, terms]
        asked = [mark, seat, source, between]
        for choice, button in buttons.items():
            button.click(self._voting(choice), asked, boxes, js=_SEEN, **_FREE)
        gr.on([begin.click, name.submit], self._begin, [name, seat, source, between], boxes, **_FREE)
        gr.on([ask.click, prompt.submit], self._ask, [name, prompt, seat, between], [*boxes, prompt], **_MODEL)
        source.input(self._turn, [source, seat], [typed, between, *boxes], **_FREE)
        if self.desk.drawing is not None:
            gr.Timer(_LOOK).tick(self._wait, [seat, source, between], boxes, **_FREE)
        blocks.load(lambda: gr.update(choices=list(self.desk.comparable(chosen))), None, [between], **_FREE)

    def _between(self, source: str) -> dict[str, Any]:
        names = self.desk.comparable(source)
        return {"choices": names, "value": self.desk.suggested(source), "visible": source != "labels"}

    def _turn(self, source: str, seat: Seat) -> list[Any]:
        """Another source was chosen."""
        seat.show(None)
        typed, between = gr.update(visible=source == TYPED), gr.update(**self._between(source))
        return [typed, between, *self._drawn(seat, "")]

    def _begin(self, name: str, seat: Seat, source: str, between: list[str]) -> list[Any]:
        if not self.desk.booth.sit(seat, name):
            return self._drawn(seat, "Write your name first, of 1 to 60 letters.", trouble=True)
        if source == TYPED:
            return self._drawn(seat, "Type a prompt: two policies answer it without their names.")
        return self._next(seat, source, between, "")

    def _ask(self, name: str, prompt: str, seat: Seat, between: list[str]) -> list[Any]:
        if not self.desk.booth.sit(seat, name):
            return [*self._drawn(seat, "Write your name first, of 1 to 60 letters.", trouble=True), gr.skip()]
        if not prompt.strip():
            return [*self._drawn(seat, ""), gr.skip()]
        try:
            self.desk.ask_both(seat, between, prompt.strip())
        except UserError as error:
            return [*self._drawn(seat, str(error), trouble=True), gr.skip()]
        return [*self._drawn(seat, "Which reply is better?"), ""]

    def _voting(self, choice: str) -> Callable[..., list[Any]]:
        def vote(mark: str, seat: Seat, source: str, between: list[str]) -> list[Any]:
            desk = self.desk
            if (ballot := desk.booth.take(seat, mark)) is None:
                return [gr.skip()] * 5
            try:
                if not choice:
                    desk.booth.skip(seat, ballot)
                    kept = "Skipped."
                else:
                    new = desk.booth.vote(seat, ballot, choice, desk.source(source))
                    kept = f"Vote {seat.cast} of {seat.voter} is kept." if new else "You had voted on these two before."
                if source == TYPED:
                    seat.show(None)
                    names = f" A was {ballot.policies[0]}, B was {ballot.policies[1]}." if choice else ""
                    return self._drawn(seat, kept + names)
                return self._next(seat, source, between, kept)
            except (UserError, OSError) as error:
                seat.show(ballot, seat.left)
                return self._drawn(seat, f"Not kept: {error}", trouble=True)

        return vote

    def _next(self, seat: Seat, source: str, between: list[str], kept: str) -> list[Any]:
        """Show the next ballot of a source, and say how many there are."""
        found = self.desk.source(source)
        assert found is not None
        try:
            if len(between) < 2 and source != "labels":
                raise UserError("between", f"{len(between)} policies chosen", "choose two or more")
            self.desk.booth.next(seat, found, between)
        except UserError as error:
            seat.show(None)
            return self._drawn(seat, str(error), trouble=True)
        alike = f" {seat.alike} were the same reply twice: ties." if seat.alike else ""
        return self._drawn(seat, f"{kept} {self._words(seat, source)}{alike}".strip())

    def _words(self, seat: Seat, source: str) -> str:
        drawing = self.desk.drawing if source == "labels" else None
        if seat.ballot is not None:
            coming = "" if drawing is None or drawing.trouble else _coming(seat.coming)
            return f"{seat.left} to go{coming}."
        if drawing is not None and (waiting := drawing.waiting()):
            return waiting
        return f"Nothing is left to vote on, {seat.voter}: thank you."

    def _wait(self, seat: Seat, source: str, between: list[str]) -> list[Any]:
        """Look whether something to vote on was drawn, where a person waits for it."""
        if source != "labels" or not seat.voter or seat.ballot is not None:
            return [gr.skip()] * 5
        return self._next(seat, source, between, "")

    def _drawn(self, seat: Seat, said: str, *, trouble: bool = False) -> list[Any]:
        there = seat.ballot is not None
        # what was settled makes room for what is to be read
        terms = gr.update(open=False) if there else gr.skip()
        return [seat, shown.notice(said, trouble=trouble), shown.ballot(seat), gr.update(visible=there), terms]
