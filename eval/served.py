"""Replies that a server draws for an evaluation: for every policy the same prompts and the same seeds (E5)."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import EVAL_CACHE
from ..models.adapters import AdapterSet
from ..models.tokens import end_token_ids
from ..progress import meter, say
from ..stages.ppo.network import Trunk
from ..stages.ppo.rollout import seed_of
from ..stages.ppo.served import open_server
from ..stages.processes import Processes
from ..stages.serving.engines import Draw
from ..stages.serving.finished import FinishedPolicies
from ..stages.serving.own import LOG
from ..stages.serving.place import place_of
from .samples import EncodedPrompt, Sample
from .spec import EvalSpec


class ServedReplies:
    """The server of an evaluation that names one. It is not asked for anything before the first reply is wanted.

    Args:
        roles: of the policies, by their names on the base.
    """

    def __init__(self, spec: EvalSpec, adapters: AdapterSet, tokenizer: Any, roles: Sequence[str]) -> None:
        assert spec.rollout is not None
        self.spec, self.adapters, self.tokenizer, self.roles = spec, adapters, tokenizer, list(roles)
        self.place = place_of(spec.rollout, "eval.rollout")
        self._policies: FinishedPolicies | None = None
        self._role: str | None = None

    def replies(
        self, role: str | None, folder: Path | None, policy: str, prompts: Sequence[EncodedPrompt], label: str
    ) -> list[Sample]:
        """One reply to each prompt.

        Args:
            role, folder: of the policy's adapter, here and on the disk; None: the base.
            policy: the name that the replies carry.
            label: of the progress.

        Raises:
            UserError: the server is not there, serves another base, or answers what was not asked for.
        """
        spec, ids = self.spec, [prompt.ids for prompt in prompts]
        policies = self._open(ids)
        seeds = [seed_of(spec.seed, "evaluation reply", place) for place in range(len(prompts))]
        draw = Draw(spec.max_new_tokens, tuple(end_token_ids(self.tokenizer, self.adapters.model)), spec.temperature)
        self._role = role
        with meter(label, len(prompts)) as done:
            drawn = policies.sample(folder, ids, seeds, draw, done)
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in drawn.tokens]
        rows = enumerate(zip(prompts, texts, drawn.tokens, drawn.finished, strict=True))
        return [Sample(policy, place, prompt, text, tokens, ended) for place, (prompt, text, tokens, ended) in rows]

    def close(self) -> None:
        """End a server that was started for this."""
        if self._policies is not None:
            self._policies.close()
            self._policies = None

    def _open(self, ids: Sequence[Sequence[int]]) -> FinishedPolicies:
        if self._policies is None:
            assert self.place is not None
            folder = self.spec.output_dir or Path(tempfile.gettempdir())
            trunk, log = Trunk(self.adapters), folder / EVAL_CACHE / LOG
            server, probe = open_server(self.place, trunk, self.roles, ids, self.spec.max_new_tokens, log, Processes())

            def check(folder: Path, name: str) -> None:
                if probe is not None and self._role is not None:
                    probe.look_at(server, name, Processes(), self._role)

            self._policies = FinishedPolicies(server, check)
            say(f"eval: {self.place.engine} at {self.place.url} draws the replies")
        return self._policies
