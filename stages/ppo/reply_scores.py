"""The sources of a recipe's reward outside a trainer: opened once, they score any replies.

Legend of shape suffixes: S sources, B replies.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from ...errors import UserError
from ...models.adapters import AdapterSet
from ...models.generate import Generation
from ..processes import Processes
from ..scorers.asked_once import AskedOnce
from ..scorers.replies import Replies
from .network import Trunk
from .rewards import Responses, RewardSource, Scores, ScoreSettings, Scoring, TextSource, build_scorers
from .rollout import make_episodes


@dataclass
class ScoreRules:
    """How scores become one: the fields of an on-policy stage that say it, with their defaults there."""

    normalize_rewards: bool = True
    reward_scale: Literal["none", "std", "running"] = "none"
    reward_clip: float | None = None
    reward_combination: Literal["sum", "ensemble"] = "sum"
    ensemble_penalty: float = 1.0
    missing_eos_penalty: float | None = None
    missing_eos_score: float | None = None


class ReplyScorer:
    """Sources that were opened.

    Args:
        adapters: the base on which reward stages score; each becomes one of its frozen adapters.
        tokenizer: the base's.
        rules: how the scores of several sources become one.
        autocast: of the forwards of reward stages.
        these: the processes that score together, each its own replies; None: this one alone.

    Raises:
        UserError: no source, a reward stage of another base or tokenizer, or a source that cannot score.
    """

    def __init__(
        self,
        sources: Sequence[RewardSource],
        adapters: AdapterSet,
        tokenizer: PreTrainedTokenizerBase,
        rules: ScoreSettings | None = None,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
        these: Processes | None = None,
    ) -> None:
        if not sources:
            raise UserError("reward", "no source of scores is given", "name a reward stage, a verifier or a function")
        self.device = next(adapters.model.parameters()).device
        pad = tokenizer.pad_token_id
        assert isinstance(pad, int)  # loading a base sets one
        self.pad_token_id = pad
        trunk = Trunk(adapters, autocast=autocast)
        scorers = build_scorers(sources, trunk, tokenizer, device=self.device, these=these)
        for head in adapters.heads.values():
            head.to(self.device)
        self.scoring = Scoring(rules or ScoreRules(), sources, scorers, lambda sums, how: sums)

    def __call__(self, replies: Replies, finished: Sequence[bool] | None = None) -> torch.Tensor:
        """One score a reply, fp32 [B]; arguments and errors as of `scores`."""
        return self.scores(replies, finished).total_B

    def scores(self, replies: Replies, finished: Sequence[bool] | None = None) -> Scores:
        """The score of each reply as training would give it (without a running scale), and each source's own.

        Args:
            replies: with `prompt_ids` and `reply_ids`; a reply has at least one token.
            finished: whether each ended by itself, for what a missing EOS costs; None: all did.

        Raises:
            UserError: a source failed, and its `on_failure` says to stop, or it scores nothing at all.
        """
        return self.scoring.scores(self._responses(replies, finished), training=False)

    def score_none(self) -> None:
        """What a process does that has no reply while the others score theirs."""
        for scorer in self.scoring.scorers:
            if isinstance(scorer, TextSource) and isinstance(scorer.scorer, AskedOnce):
                scorer.scorer(Replies([], []))

    def _responses(self, replies: Replies, finished: Sequence[bool] | None) -> Responses:
        ids = [list(each) for each in replies.reply_ids]
        ended = [True] * len(ids) if finished is None else list(finished)
        generation = Generation(ids, [[0.0] * len(each) for each in ids], ended)
        prompts = [list(each) for each in replies.prompt_ids]
        episodes = make_episodes(prompts, generation, self.pad_token_id, self.device)
        columns = {name: list(values) for name, values in replies.columns.items()}
        return Responses(episodes, list(replies.prompts), list(replies.texts), columns, replies.rows)
