"""The three kinds of reward source, each as an object that scores a batch of responses.

Raw scores here; `rewards.py` combines and scales them.

Legend of shape suffixes: B responses.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from ..errors import UserError
from ..models.adapters import AdapterSet
from ..models.lineage import adapter_sha256, check_lineage, read_lineage
from .ppo_forward import Trunk
from .rewards import RewardSource
from .rollout import Episodes, micro_batches

Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Responses:
    """A batch to score: tokens for adapters, text for everything else.

    prompts: as the data had them, text or messages. texts: the responses without special tokens.
    columns: every other column of the data, a list a response.
    """

    episodes: Episodes
    prompts: list[Prompt]
    texts: list[str]
    columns: dict[str, list[Any]]

    def completions(self) -> list[Any]:
        """In the prompts' own form: text, or a list with one assistant message."""
        return [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(self.prompts, self.texts, strict=True)
        ]


class Scorer(Protocol):
    """`normal` is (mean, std) of the scores on reference responses, where they are known."""

    name: str

    @property
    def normal(self) -> tuple[float, float] | None: ...

    def __call__(self, responses: Responses) -> torch.Tensor:
        """Raw scores, fp32 [B], on the episodes' device."""
        ...


class AdapterScorer:
    """A reward stage: its adapter on the shared base, its head read at the last response token."""

    def __init__(self, trunk: Trunk, role: str, source: RewardSource, batch_size: int) -> None:
        self.trunk, self.role, self.name, self.batch_size = trunk, role, source.name, batch_size
        reward = read_lineage(_path(source)).reward
        self.normal = (float(reward["mean"]), float(reward["std"])) if reward else None

    @torch.no_grad()
    def __call__(self, responses: Responses) -> torch.Tensor:
        episodes = responses.episodes
        scores_B = torch.zeros(len(episodes), device=episodes.start_B.device)
        everyone = torch.arange(len(episodes), device=episodes.start_B.device)
        for rows in micro_batches(episodes, everyone, self.batch_size):
            scores_B[rows] = self.trunk.scores(self.role, episodes.rows(rows))
        return scores_B


class ModelScorer:
    """Any sequence-classification model with one output: decode, re-template with its own tokenizer, encode.

    A score is what the model's plain forward gives for that text alone; batching and padding change nothing.
    `where` is its place in the recipe, for errors; None: a reward's.
    """

    normal = None

    def __init__(self, source: RewardSource, device: torch.device, batch_size: int, where: str | None = None) -> None:
        self.name, self.device, self.batch_size = source.name, device, batch_size
        self.where = where or f"reward {self.name}"
        self.tokenizer = AutoTokenizer.from_pretrained(str(source.target))
        self.model: Any = AutoModelForSequenceClassification.from_pretrained(str(source.target)).eval().to(device)
        self.model.requires_grad_(False)
        if self.model.config.num_labels != 1:
            raise UserError(
                self.where,
                f"the model has {self.model.config.num_labels} outputs, expected 1",
                "take a reward model with num_labels=1, or wrap this one in a function",
            )
        config = self.model.config.get_text_config()
        self.pad_token_id: int | None = config.pad_token_id
        self.limit = min(self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 1 << 30)
        # a text that is too long loses the prompt's beginning, never the response
        self.tokenizer.truncation_side = "left"

    def __call__(self, responses: Responses) -> torch.Tensor:
        return self.scores(responses.prompts, responses.texts)

    @torch.no_grad()
    def scores(
        self, prompts: Sequence[Prompt], replies: Sequence[str], on_batch: Callable[[int], None] | None = None
    ) -> torch.Tensor:
        """Raw scores of the replies to these prompts, fp32 [B], on the model's device.

        Args:
            prompts: text or messages.
            on_batch: called with the number of replies done so far.

        Raises:
            UserError: the prompts are conversations and the model's tokenizer has no chat template.
        """
        texts = [self._encode(p, t) for p, t in zip(prompts, replies, strict=True)]
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]["input_ids"]))
        scores_B = torch.zeros(len(texts), device=self.device)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            scores_B[rows] = self.model(**self._batch([texts[i] for i in rows])).logits[:, 0].float()
            if on_batch is not None:
                on_batch(start + len(rows))
        return scores_B

    def _encode(self, prompt: Prompt, text: str) -> dict[str, list[int]]:
        templated = not isinstance(prompt, str)
        # a template writes its own BOS
        return dict(
            self.tokenizer(
                self._template(prompt, text) if templated else prompt + text,
                add_special_tokens=not templated,
                truncation=True,
                max_length=self.limit,
            )
        )

    def _template(self, prompt: list[dict[str, Any]], text: str) -> str:
        if self.tokenizer.chat_template is None:
            raise UserError(
                self.where,
                "its tokenizer has no chat template and the prompts are conversations",
                "use a reward model with a template, or wrap it in a function",
            )
        turns = [*prompt, {"role": "assistant", "content": text}]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False))

    def _batch(self, texts: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Right-padded. A decoder's classifier reads its score at the last token that is not its config's PAD; where
        that names none, one is taken that no text of the batch holds."""
        pad = self.pad_token_id
        if pad is None:
            used = {token for each in texts for token in each["input_ids"]}
            pad = next(token for token in range(len(used) + 1) if token not in used)
            self.model.config.get_text_config().pad_token_id = pad
        return {
            name: pad_sequence(
                [torch.tensor(each[name]) for each in texts],
                batch_first=True,
                padding_value=pad if name == "input_ids" else 0,
            ).to(self.device)
            for name in texts[0]
        }


class FunctionScorer:
    """A Python function with TRL's signature: f(prompts, completions, **columns) -> list[float | None]."""

    normal = None

    def __init__(self, source: RewardSource) -> None:
        self.name = source.name
        self.function = source.target if callable(source.target) else import_function(source.target)
        parameters = inspect.signature(self.function).parameters
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self.accepted = None if takes_all else set(parameters)

    def __call__(self, responses: Responses) -> torch.Tensor:
        given: dict[str, Any] = {
            **responses.columns,
            "prompts": responses.prompts,
            "completions": responses.completions(),
            "completion_ids": responses.episodes.responses(),
        }
        if self.accepted is not None:
            given = {name: value for name, value in given.items() if name in self.accepted}
        # None means "does not apply", as in TRL: it adds nothing
        scores = [0.0 if score is None else float(score) for score in self.function(**given)]
        if len(scores) != len(responses.texts):
            raise UserError(
                f"reward {self.name}",
                f"it returned {len(scores)} scores for {len(responses.texts)} completions",
                "return one number a completion",
            )
        scores_B = torch.tensor(scores, dtype=torch.float32, device=responses.episodes.start_B.device)
        if not bool(scores_B.isfinite().all()):
            bad = int((~scores_B.isfinite()).nonzero()[0])
            raise UserError(
                f"reward {self.name}",
                f"it returned {scores[bad]} for completion {responses.texts[bad][:80]!r}",
                "return finite numbers",
            )
        return scores_B


def build_scorers(
    sources: Sequence[RewardSource],
    trunk: Trunk,
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: torch.device,
    batch_size: int,
) -> list[Scorer]:
    """One scorer a source; a reward stage becomes the frozen adapter "reward" (the next ones "reward_2", ...).

    Raises:
        UserError: a reward stage of another base or tokenizer, or a model or function that cannot score.
    """
    scorers: list[Scorer] = []
    stages = 0
    for source in sources:
        if source.kind == "stage":
            stages += 1
            role = "reward" if stages == 1 else f"reward_{stages}"
            check_lineage(_path(source), trunk.adapters.base, tokenizer)
            _load_stage(trunk.adapters, role, source)
            scorers.append(AdapterScorer(trunk, role, source, batch_size))
        elif source.kind == "model":
            scorers.append(ModelScorer(source, device, batch_size))
        else:
            scorers.append(FunctionScorer(source))
    return scorers


def _load_stage(adapters: AdapterSet, role: str, source: RewardSource) -> None:
    """The stage's frozen adapter; one that an earlier trainer has put there is kept if it is the same."""
    if role not in adapters.names:
        adapters.load(role, _path(source), trainable=False)
    elif adapters.digest(role) != adapter_sha256(_path(source)):
        raise UserError(
            f"reward {source.name}", f"the adapters hold another {role!r} already", "start from a fresh AdapterSet"
        )
    if role not in adapters.heads:
        raise UserError(f"reward {source.name}", "the adapter has no score head", "name a reward stage")


def import_function(spec: str) -> Callable[..., list[float]]:
    """The function named "module:function".

    Raises:
        UserError: no such module or function.
    """
    module, _, name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"reward {spec}", f"cannot be imported ({error})", "write module:function, importable from here"
        ) from error
    if not callable(function):
        raise UserError(f"reward {spec}", f"is a {type(function).__name__}, expected a function", "name a function")
    return function  # type: ignore[return-value]


def _path(source: RewardSource) -> Path:
    return Path(str(source.target))


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[list[int]]) -> list[str]:
    """Responses as text, special tokens left out."""
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in ids]
