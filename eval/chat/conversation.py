"""Talking with a run's policies, one reply at a time: what `preftune chat` does beside the terminal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from ...data.rows import Message
from ...data.template import prompt_ids
from ...errors import UserError
from ...models.beam import beam_search
from ...models.generate import sample
from ...models.tokens import end_token_ids
from ..workbench import Workbench


@dataclass(frozen=True)
class Reply:
    """What a policy said.

    Attributes:
        text: special tokens left out.
        tokens: how many, its EOS included where it was reached.
        finished: whether it ended at EOS.
        stopped: whether it was stopped from outside; neither: it was cut at `max_new_tokens`.
    """

    policy: str
    text: str
    tokens: int
    finished: bool
    stopped: bool


@dataclass(frozen=True)
class Conversation:
    """The policies of a workbench, which answer prompts that are made up as one goes."""

    bench: Workbench

    def add(self, policy: str, folder: Path | None) -> None:
        """Makes a policy that the workbench was not opened with answer too; None is the base.

        Raises:
            UserError: the folder holds no adapter, or one of another base or tokenizer.
        """
        if policy not in self.bench.roles:
            self.bench.roles[policy] = self.bench.load(folder)

    def reply(
        self,
        policy: str,
        messages: Sequence[Message],
        *,
        seed: int,
        on_text: Callable[[str], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Reply:
        """The policy's reply to the messages, with the evaluation's settings; beam search shows it once it is whole.

        Args:
            seed: of its random stream; policies that agree say the same with the same seed.
            on_text: called with the parts of the text, as soon as their words are complete.
            stop: asked after every token; once it says yes the reply ends there, a beam search without a reply.

        Raises:
            UserError: the chat template refuses the messages, or the conversation has become too long for the model.
        """
        spec, tokenizer = self.bench.spec, self.bench.tokenizer
        ids = prompt_ids(tokenizer, list(messages))
        room = min(spec.max_new_tokens, self._room(len(ids)))
        tokens: list[int] = []
        stream = _Stream(tokenizer, on_text or (lambda text: None))

        def heard(_: list[int], newest: list[int]) -> None:
            tokens.extend(newest)
            stream.put(torch.tensor(newest))
            if stop():
                raise _Stopped

        def searched() -> None:
            if stop():
                raise _Stopped

        adapters, role, stopped = self.bench.adapters, self.bench.roles[policy], False
        shared = self._shared(room)
        ends = shared["eos_token_id"]
        try:
            if spec.beams > 1:
                # which beam is the best is known at the end
                best = beam_search(adapters, role, [ids], num_beams=spec.beams, on_step=searched, **shared)
                tokens.extend(best.tokens[0])
                stream.put(torch.tensor(tokens))
            else:
                asked = {"temperature": spec.temperature, "seed": [seed], "recompute": True}
                sample(adapters, role, [ids], on_tokens=heard, **asked, **shared)
        except _Stopped:
            stopped = True
        stream.end()
        finished = bool(tokens) and tokens[-1] in ends
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        return Reply(policy, text, len(tokens), finished, stopped and not finished)

    def replies(self, policy: str, asked: Sequence[Sequence[Message]], seeds: Sequence[int]) -> list[Reply]:
        """The policy's replies to several conversations, drawn together; each has a random stream of its own.

        Raises:
            UserError: as `reply`.
        """
        spec, tokenizer = self.bench.spec, self.bench.tokenizer
        ids = [prompt_ids(tokenizer, list(messages)) for messages in asked]
        shared = self._shared(min(spec.max_new_tokens, *(self._room(len(each)) for each in ids)))
        adapters, role = self.bench.adapters, self.bench.roles[policy]
        if spec.beams > 1:
            drawn = beam_search(adapters, role, ids, num_beams=spec.beams, **shared)
        else:
            settings = {"temperature": spec.temperature, "seed": list(seeds), "recompute": True}
            drawn = sample(adapters, role, ids, **settings, **shared)
        texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in drawn.tokens]
        parts = zip(texts, drawn.tokens, drawn.finished, strict=True)
        return [Reply(policy, text, len(tokens), finished, False) for text, tokens, finished in parts]

    def _shared(self, room: int) -> dict[str, Any]:
        """What drawing and searching are told alike."""
        tokenizer = self.bench.tokenizer
        return {
            "max_new_tokens": room,
            "eos_token_id": end_token_ids(tokenizer, self.bench.adapters.model),
            "pad_token_id": tokenizer.pad_token_id,
        }

    def _room(self, prompt: int) -> int:
        """Tokens that the model can still read after so many."""
        backbone: Any = self.bench.adapters.backbone
        config = backbone.config.get_text_config()
        most = getattr(config, "max_position_embeddings", None)
        if most is None:
            return self.bench.spec.max_new_tokens
        if prompt >= most:
            remedy = "begin a new one (/new)"
            raise UserError("conversation", f"{prompt} tokens, and the model can read {most}", remedy)
        return most - prompt


class _Stopped(Exception):
    pass


class _Stream(TextStreamer):
    """transformers' streamer, which knows when a word is complete, with another place to write to."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)
