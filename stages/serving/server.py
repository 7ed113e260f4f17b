"""A server that draws replies: asked for many at a time, each answer looked at, waited for where it goes away.

A row's reply depends on the adapter, its prompt and its seed, and on no other row. So where a server dies in the
middle, what it has answered stays, and the rest is asked for again with the same seeds once it is back.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx2 as httpx

from ... import stopping
from ...errors import Lost, UserError
from ...models.generate import Generation
from ..scorers.posting import NotThere, Poster, Unanswered
from .engines import ENGINES, Draw, Drawn, Engine, Listing, adapter_body, listing
from .place import Place

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_K = TypeVar("_K")

_REMEDIES = (
    "see that the server runs, and run the same command again: it goes on from the last checkpoint",
    "correct the url, or start the server so that adapters can be loaded while it runs (preftune serve says how)",
    "see what the server says of it",
)
_WRONG = "see that it is the server that engine says, in a version that is supported (docs/servers.md)"
_PAUSE = 1.0
"""Seconds between two looks whether a server is back."""
_ROUNDS = 3
"""So often in a row the same replies are asked for without one more of them coming."""
_LATE = 500
"""Statuses from here on are a server's that may come back."""
_SCALED = 2.0
"""The temperature at which log-probs are looked at, and the factor by which they lie closer together there."""


class RolloutServer:
    """What a stage or an evaluation asks.

    Args:
        place: where it is, and how it is asked.
        vocabulary: ids of tokens lie below this; None: nothing is known of them.
    """

    def __init__(self, place: Place, vocabulary: int | None = None) -> None:
        self.place, self.vocabulary = place, vocabulary
        self.engine: Engine = ENGINES[place.engine]
        self._scaled: bool | None = None
        self.restarts = 0

    # --- what it has

    def listing(self) -> Listing:
        """The base and the adapters that it has. Raises UserError where it does not say."""
        return listing(self._one("models"))

    def load(self, name: str, folder: Path) -> None:
        """Have it load the adapter in that folder, unless it has it under that name; it is waited for.

        Raises:
            UserError: it does not, or says afterwards that it has another one.
        """
        for left in reversed(range(_ROUNDS)):
            try:
                self._load(name, str(folder.absolute()))
                return
            except Unanswered as error:
                if not left or not self._may_come_back(error):
                    raise
                self._await(error)

    def _load(self, name: str, wanted: str) -> None:
        if name not in self.listing().adapters:
            self._one("load", adapter_body(name, wanted), retries=1)
        held = self.listing().adapters.get(name)
        if held is None or Path(held) != Path(wanted):
            said = f"{self.place.url} says that {name} is {held or 'not there'}, expected {wanted}"
            raise UserError(self.place.where, said, "see that no other run loads adapters of that name")

    def unload(self, name: str) -> None:
        """Have it let go of an adapter; a server that cannot is left as it is."""
        try:
            self._one("unload", adapter_body(name), retries=0)
        except NotThere:
            pass
        except Unanswered as error:
            logger.warning("%s is left on the server: %s", name, error.problem)

    # --- what it says

    def check_draw(self, draw: Draw, ids: Sequence[int]) -> None:
        """That its log-probs of such a draw are those of softmax(logits / temperature) before any cut.

        Args:
            ids: a prompt, after which it is asked for its likeliest tokens where that has to be found out.

        Raises:
            UserError: they are not.
        """
        if (wrong := self.engine.not_ours(draw, self._is_scaled(draw, ids))) is None:
            return
        said = f"the server's log-probs are not those of the policy at temperature {draw.temperature:g} before any cut"
        starts = self.engine.starts
        remedy = "leave top_k and top_p out, or set temperature: 1"
        if not draw.cuts:
            remedy = f"start it with {starts[0]}, or set temperature: 1"
        elif not draw.scales:
            remedy = f"start it with {starts[1]}, or leave top_k and top_p out"
        raise UserError(self.place.where, f"{said}: {wrong}", remedy)

    def sample(
        self,
        name: str,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        draw: Draw,
        *,
        again: Callable[[], None] | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> Generation:
        """One reply to each prompt, in their order.

        Args:
            name: of the adapter that speaks, or of the base.
            seeds: one for each prompt, which with the prompt fixes its reply, as far as the server's rounding does.
            again: called once a server that went away is back, before it is asked again: what it is to load.
            on_batch: called with the number of replies so far.

        Raises:
            UserError: an answer that is not what was asked for, or none within the place's patience.
        """
        self.check_draw(draw, prompts[0])
        bodies = {
            row: self.engine.draw(name, prompt, draw, seed)
            for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        }

        def read(row: int, given: Any) -> Drawn:
            drawn = self.engine.drawn(given)
            self._check(drawn, name, prompts[row], draw)
            return drawn

        found = self._all(bodies, read, again, on_batch)
        rows = [found[row] for row in range(len(prompts))]
        finished = [each.tokens[-1] in draw.ends for each in rows]
        return Generation([each.tokens for each in rows], [each.logprobs for each in rows], finished)

    def scores(self, name: str | None, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """The log-probs of each row's tokens but the first, at temperature 1, before any cut.

        Args:
            name: of the adapter; None: of the base.
        """
        found: list[list[float]] = []
        for ids in rows:
            # one at a time: vLLM 0.32 with --enable-lora ends where several prompts' log-probs are asked for at once
            body = self.engine.score(name, ids)
            found.append(self._all({0: body}, lambda _, given, ids=ids: self.engine.scores(given, ids))[0])
        return found

    # --- how it is asked

    def _one(self, what: str, body: dict[str, Any] | None = None, retries: int | None = None) -> Any:
        """The answer to one request, which is not asked for replies: JSON where there is no body."""
        found: dict[str, Any] = {}
        place = self.place.at(self.engine.says[what], **({} if retries is None else {"retries": retries}))
        poster = Poster(place, _REMEDIES)

        def read(what: str, response: httpx.Response, retries: int) -> Any:
            del what, retries
            return self._read(poster, response, _as_it_is) if body is None else None

        poster.send_all({what: body}, read, found.__setitem__)
        return found[what]

    def _all(
        self,
        bodies: Mapping[_K, dict[str, Any]],
        read: Callable[[_K, Any], _T],
        again: Callable[[], None] | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> dict[_K, _T]:
        """What each answer says; where the server goes away, the missing ones once it is back."""
        found: dict[_K, _T] = {}
        poster = Poster(self.place.at(self.engine.says["draw"]), _REMEDIES)
        idle = 0

        def heard(key: _K, response: httpx.Response, retries: int) -> None:
            del retries
            found[key] = self._read(poster, response, lambda given: read(key, given))

        def take(key: _K, nothing: None) -> None:
            del key, nothing
            if on_batch is not None:
                on_batch(len(found))

        while missing := {key: body for key, body in bodies.items() if key not in found}:
            before = len(found)
            try:
                poster.send_all(missing, heard, take)
            except (Unanswered, NotThere) as error:
                idle = idle + 1 if len(found) == before else 1
                if not self._may_come_back(error):
                    raise
                if idle > _ROUNDS:
                    raise Lost(error.where, error.problem, error.remedy) from None
                self._await(error)
                if again is not None:
                    again()
                self.restarts += 1
                logger.warning(
                    "%s: %s; it is back, and %d of %d replies are asked for again, with the same seeds",
                    self.place.where, error.problem, len(bodies) - len(found), len(bodies),
                )  # fmt: skip
        return found

    def _await(self, error: UserError) -> None:
        """Wait until the server answers. Raises Lost, with the error's words, where it does not in time."""
        until = time.monotonic() + self.place.wait
        logger.warning("%s: %s; waiting up to %g s for it", self.place.where, error.problem, self.place.wait)
        poster = Poster(self.place.at(self.engine.says["models"], retries=0), _REMEDIES)
        while True:
            try:
                poster.send_all({"": None}, lambda _, response, __: None, lambda _, __: None)
                return
            except Unanswered:
                if time.monotonic() >= until:
                    raise Lost(error.where, error.problem, error.remedy) from None
            stopping.poll()
            time.sleep(min(_PAUSE, max(until - time.monotonic(), 0.0)))

    def _read(self, poster: Poster, response: httpx.Response, read: Callable[[Any], _T]) -> _T:
        try:
            return read(json.loads(response.text))
        except (ValueError, LookupError, TypeError, AttributeError, StopIteration, RecursionError) as error:
            shown = poster.hide(f"{type(error).__name__}: {error}")[:200]
            said = f"{poster.server.address} gave an answer of another shape ({shown}){poster.said(response)}"
            raise UserError(self.place.where, said, _WRONG) from None

    # --- whether it is what was asked for

    def _check(self, drawn: Drawn, name: str, prompt: Sequence[int], draw: Draw) -> None:
        """Raises UserError where a reply is another adapter's, of another prompt, or drawn in another way."""
        tokens, most = drawn.tokens, draw.max_new_tokens
        last, ends = (tokens[-1] if tokens else None), [place for place, each in enumerate(tokens) if each in draw.ends]
        known = self.vocabulary is None or all(0 <= each < self.vocabulary for each in tokens)
        whose = f"is that of {drawn.model}, expected {name}: it is stale, or another run's"
        wrong = {
            whose: drawn.model not in (None, name),
            "is one to another prompt": drawn.prompt is not None and list(drawn.prompt) != list(prompt),
            f"has {len(tokens)} tokens, expected 1 to {most}": not 0 < len(tokens) <= most,
            f"has {len(drawn.logprobs)} log-probs for {len(tokens)} tokens": len(drawn.logprobs) != len(tokens),
            "has a log-prob that is none": not all(-1e30 < each <= 1e-3 for each in drawn.logprobs),
            f"has token {max(tokens, default=0)}, and the base has {self.vocabulary}": not known,
            f"ended with token {last}, expected one of {', '.join(map(str, draw.ends))}": drawn.ended and not ends,
            "goes on after a token that ends it": bool(ends) and ends[0] != len(tokens) - 1,
            f"was cut off at {len(tokens)} tokens, expected {most}": not (drawn.ended or ends) and len(tokens) < most,
        }
        for said, found in wrong.items():
            if found:
                raise UserError(self.place.where, f"{self.place.url} gave a reply that {said}", _WRONG)

    def _is_scaled(self, draw: Draw, ids: Sequence[int]) -> bool:
        """Whether its log-probs are those at the temperature of the draw: found out once, where it matters.

        At another temperature those of the likeliest tokens lie closer together, or they are not touched by it.
        """
        if not (draw.scales or draw.cuts):
            return False
        if self._scaled is None:
            bodies = {each: self.engine.spread(ids, each) for each in (1.0, _SCALED)}
            found = self._all(bodies, lambda _, given: self.engine.spreads(given))
            plain, scaled = (found[each][0] - found[each][-1] for each in (1.0, _SCALED))
            self._scaled = scaled * _SCALED**0.5 < plain
        return self._scaled is True

    def _may_come_back(self, error: UserError) -> bool:
        """Whether the server is gone for a while, or has forgotten what it had loaded."""
        if isinstance(error, NotThere) or self.engine.forgotten in error.problem:
            return True
        return isinstance(error, Unanswered) and (error.status is None or error.status >= _LATE)


def _as_it_is(given: Any) -> Any:
    return given
