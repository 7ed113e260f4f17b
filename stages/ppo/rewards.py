"""Where scores come from: the sources, an object that scores for each, and the arithmetic up to the last token.

Legend of shape suffixes: S sources, B responses.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from ...data.rows import Message
from ...data.template import rendered
from ...errors import UserError
from ...models.adapters import REWARD, AdapterSet
from ...models.auto import open_model, open_tokenizer
from ...models.batching import forward_tokens, row_batches, token_batches
from ...models.lineage import adapter_sha256, check_lineage, read_lineage
from ...models.loading import model_folder
from ...models.masked import masked_moments
from ...models.transfer import to_device
from ..processes import Processes
from ..reward_functions import RewardFunction
from ..scorers.asked_once import SERVERS, AskedOnce
from ..scorers.opening import OPENERS, Opening
from ..scorers.replies import Failures, OnFailure, Replies, TextScorer, wrong_score
from .network import Trunk
from .rollout import Episodes, PromptText, Reduce

RewardKind = Literal["stage", "model", "function", "rubric", "verifier", "endpoint", "http"]
RewardFunc = str | RewardFunction
"""A source of scores as a user gives it: a function, or a name."""


@dataclass(frozen=True)
class RewardSource:
    """One source of scores.

    Attributes:
        kind: "stage": the folder of a reward stage (an adapter on the same base); "model": a hub id or local folder of
            any sequence-classification model, with its own tokenizer; "function": "module:function" or a callable with
            TRL's signature `f(prompts, completions, **columns) -> list[float | None]`; "rubric", "verifier",
            "endpoint", "http": what `settings` says.
        target: the folder, the model or the function; of the other kinds a name for logs.
        weight: its factor in the sum; unused in an ensemble.
        settings: of the last four kinds, the fields that a recipe has: {"check": "numeric", "column": "answer"}, say.
        on_failure: what becomes of a reply that it fails to score: "stop" with an error, "skip" this source for that
            reply, or the number that it gets.
        run_dir: the run in whose folder a server's answers are kept, where `settings` name no other; None: in memory.
    """

    kind: RewardKind
    target: RewardFunc
    weight: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    on_failure: OnFailure = "stop"
    run_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(RewardKind):
            known = ", ".join(map(repr, get_args(RewardKind)))
            raise ValueError(f"reward kind is {self.kind!r}, expected one of {known}")
        rule = self.on_failure
        if rule not in ("stop", "skip") and (isinstance(rule, str) or wrong_score(rule) is not None):
            raise ValueError(f"on_failure is {rule!r}, expected 'stop', 'skip' or a finite number")
        if callable(self.target) and self.kind != "function":
            raise ValueError(f"a reward of kind {self.kind!r} was given a function, expected a path or a model id")

    @property
    def name(self) -> str:
        """For logs: the function's name, or the target as written."""
        return self.target if isinstance(self.target, str) else getattr(self.target, "__name__", repr(self.target))

    def as_dict(self) -> dict[str, Any]:
        """For lineage.json: nothing secret, and no place on this machine but a model's own."""
        target = Path(self.name).name if self.kind == "stage" else self.name
        said = {"kind": self.kind, "target": target, "weight": self.weight}
        more = {"settings": dict(self.settings)} if self.settings else {}
        return {**said, **more, **({} if self.on_failure == "stop" else {"on_failure": self.on_failure})}

    def opening(self, where: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Opening:
        """What one of `OPENERS` opens."""
        settings = {"function": self.target} if self.kind == "function" else self.settings
        return Opening(settings, where, self.on_failure, tokenizer, self.run_dir)


def combine(
    scores_SB: torch.Tensor, weights_S: torch.Tensor, *, how: Literal["sum", "ensemble"] = "sum", penalty: float = 1.0
) -> torch.Tensor:
    """One score a response [B]: the weighted sum, or (an ensemble's) mean minus `penalty` times standard deviation.

    The ensemble's standard deviation is over the S sources, population form, as in uncertainty-weighted optimisation
    (Coste et al. 2023, arXiv 2310.02743, eq. 4 uses the variance; the standard deviation keeps the score's unit). NaN
    is a source that does not apply to a response: it is left out, and a response without any score gets 0, as in TRL.
    """
    if how == "sum":
        return (weights_S[:, None] * scores_SB).nansum(0)
    if not bool(scores_SB.isnan().any()):
        return scores_SB.mean(0) - penalty * scores_SB.std(0, correction=0)
    mean_B = scores_SB.nanmean(0)
    std_B = (scores_SB - mean_B).square().nanmean(0).sqrt()
    return (mean_B - penalty * std_B).nan_to_num(0.0)


def apply_eos_rule(
    scores_B: torch.Tensor, finished_B: torch.Tensor, *, penalty: float | None, replacement: float | None
) -> torch.Tensor:
    """What a response without EOS gets: its score minus `penalty`, or `replacement` instead of it. Not the same.

    Raises:
        ValueError: both are given.
    """
    if penalty is not None and replacement is not None:
        raise ValueError(
            f"missing_eos_penalty is {penalty} and missing_eos_score is {replacement}, expected one of them; "
            "the first subtracts from the score, the second replaces it"
        )
    if replacement is not None:
        return torch.where(finished_B, scores_B, replacement)
    return torch.where(finished_B, scores_B, scores_B - penalty) if penalty is not None else scores_B


class RunningScale:
    """Running standard deviation of all scores seen (Chan et al.'s parallel update), to divide scores by."""

    def __init__(self, count: float = 0.0, mean: float = 0.0, m2: float = 0.0) -> None:
        self.count, self.mean, self.m2 = count, mean, m2

    def update(self, moments: torch.Tensor) -> None:
        """Add a batch given as [count, sum, sum of squares] over all processes."""
        count, total, squares = (float(x) for x in moments)
        if count == 0:
            return
        mean = total / count
        shift = mean - self.mean
        both = self.count + count
        self.m2 += max(squares - count * mean * mean, 0.0) + shift * shift * self.count * count / both
        self.mean += shift * count / both
        self.count = both

    @property
    def std(self) -> float:
        """1.0 until two different scores have been seen."""
        return (self.m2 / self.count) ** 0.5 if self.count > 1 and self.m2 > 0 else 1.0

    def state(self) -> list[float]:
        """Constructor arguments that bring this object back."""
        return [self.count, self.mean, self.m2]


@dataclass(frozen=True)
class Responses:
    """A batch to score: tokens for adapters, text for everything else.

    prompts: as the data had them, text or messages. texts: the responses without special tokens.
    columns: every other column of the data, a list a response.
    rows: places of the prompts in the data, for messages; empty where they are not known.
    """

    episodes: Episodes
    prompts: list[PromptText]
    texts: list[str]
    columns: dict[str, list[object]]
    rows: Sequence[int] = ()

    def replies(self) -> Replies:
        """What a source needs that reads texts."""
        host = self.episodes.host
        starts = host.start_B.tolist()
        prompt_ids = [row[:start].tolist() for row, start in zip(host.ids_BT, starts, strict=True)]
        return Replies(self.prompts, self.texts, self.columns, prompt_ids, self.episodes.responses(), self.rows)


class Scorer(Protocol):
    """`normal` is (mean, std) of the scores on reference responses, where they are known."""

    name: str

    @property
    def normal(self) -> tuple[float, float] | None: ...

    def __call__(self, responses: Responses) -> torch.Tensor:
        """Raw scores, fp32 [B], on the episodes' device; NaN where the source does not apply."""
        ...


class AdapterScorer:
    """A reward stage: its adapter on the shared base, its head read at the last response token."""

    def __init__(self, trunk: Trunk, role: str, source: RewardSource) -> None:
        self.trunk, self.role, self.name = trunk, role, source.name
        reward = read_lineage(_path(source)).reward
        self.normal = (float(reward["mean"]), float(reward["std"])) if reward else None

    @torch.no_grad()
    def __call__(self, responses: Responses) -> torch.Tensor:
        episodes = responses.episodes
        scores_B = torch.zeros(len(episodes), device=episodes.start_B.device)
        for rows in self.trunk.batches(episodes):
            scores_B[to_device(rows, scores_B.device)] = self.trunk.scores(self.role, episodes.rows(rows))
        return scores_B


class ModelScorer:
    """Any sequence-classification model with one output: decode, re-template with its own tokenizer, encode.

    A score is what the model's plain forward gives for that text alone; batching and padding change nothing.
    `where` is its place in the recipe, for errors; None: a reward's. `batch_size`: replies in a forward; None: as many
    as memory has room for.
    """

    normal = None

    def __init__(
        self, source: RewardSource, device: torch.device, batch_size: int | None = None, where: str | None = None
    ) -> None:
        self.name, self.device, self.batch_size = source.name, device, batch_size
        self.where = where or f"reward {self.name}"
        folder = model_folder(str(source.target), self.where)
        self.tokenizer: Any = open_tokenizer(folder, self.where)
        model: Any = open_model(AutoModelForSequenceClassification, folder, self.where)
        self.model: PreTrainedModel = model.eval().to(device)
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
        self, prompts: Sequence[PromptText], replies: Sequence[str], on_batch: Callable[[int], None] | None = None
    ) -> torch.Tensor:
        """Raw scores of the replies to these prompts, fp32 [B], on the model's device.

        Args:
            prompts: text or messages.
            on_batch: called with the number of replies done so far.

        Raises:
            UserError: the prompts are conversations and the model's tokenizer has no chat template.
        """
        texts = [self._encode(p, t) for p, t in zip(prompts, replies, strict=True)]
        scores_B, done = torch.zeros(len(texts), device=self.device), 0
        for rows in self._split([len(each["input_ids"]) for each in texts]):
            scores_B[rows] = self.model(**self._batch([texts[i] for i in rows])).logits[:, 0].float()
            done += len(rows)
            if on_batch is not None:
                on_batch(done)
        return scores_B

    def batches(self, prompts: Sequence[PromptText], replies: Sequence[str]) -> Iterator[list[int]]:
        """The places of the replies that go through the model together."""
        yield from self._split([len(self._encode(p, t)["input_ids"]) for p, t in zip(prompts, replies, strict=True)])

    def _split(self, lengths: list[int]) -> Iterator[list[int]]:
        if self.batch_size is not None:
            return row_batches(lengths, self.batch_size)
        return token_batches(lengths, forward_tokens(self.model))

    def _encode(self, prompt: PromptText, text: str) -> dict[str, list[int]]:
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

    def _template(self, prompt: list[Message], text: str) -> str:
        if self.tokenizer.chat_template is None:
            raise UserError(
                self.where,
                "its tokenizer has no chat template and the prompts are conversations",
                "use a reward model with a template, or wrap it in a function",
            )
        turns = [*prompt, {"role": "assistant", "content": text}]
        return rendered(self.tokenizer, turns, self.where)

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


class TextSource:
    """A source that reads texts and the data's columns: a function, a rubric, a verifier, a server."""

    normal = None

    def __init__(self, source: RewardSource, scorer: TextScorer) -> None:
        self.name, self.scorer = source.name, scorer

    def __call__(self, responses: Responses) -> torch.Tensor:
        scores = self.scorer(responses.replies())
        return torch.tensor(scores, dtype=torch.float32, device=responses.episodes.start_B.device)


class FiniteScorer:
    """A model's scores, none of which is to be NaN or infinite: what is, is a failure of the source."""

    def __init__(self, scorer: "AdapterScorer | ModelScorer", source: RewardSource) -> None:
        self.name, self.scorer, self.normal = scorer.name, scorer, scorer.normal
        self.failures = Failures(f"reward {source.name}", source.on_failure)

    def __call__(self, responses: Responses) -> torch.Tensor:
        scores_B = self.scorer(responses)
        if bool(scores_B.isfinite().all()):
            return scores_B
        scores = scores_B.tolist()
        why = {place: said for place, score in enumerate(scores) if (said := wrong_score(score)) is not None}
        settled = self.failures.settled(responses.replies(), scores, why, "see what the model makes of this reply")
        return torch.tensor(settled, dtype=scores_B.dtype, device=scores_B.device)


def build_scorers(
    sources: Sequence[RewardSource],
    trunk: Trunk,
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: torch.device,
    these: Processes | None = None,
) -> list[Scorer]:
    """One scorer a source; a reward stage becomes the frozen adapter "reward" (the next ones "reward_2", ...).

    Args:
        these: the processes that score together, each its own replies; None: this one alone.

    Raises:
        UserError: a reward stage of another base or tokenizer, or a source that cannot score.
    """
    scorers: list[Scorer] = []
    stages = 0
    for source in sources:
        if source.kind == "stage":
            stages += 1
            role = REWARD if stages == 1 else f"{REWARD}_{stages}"
            check_lineage(_path(source), trunk.adapters.base, tokenizer)
            _load_stage(trunk.adapters, role, source)
            scorers.append(FiniteScorer(AdapterScorer(trunk, role, source), source))
        elif source.kind == "model":
            scorers.append(FiniteScorer(ModelScorer(source, device, source.settings.get("batch_size")), source))
        else:
            scorers.append(text_source(source, tokenizer, these))
    return scorers


def text_source(
    source: RewardSource, tokenizer: PreTrainedTokenizerBase | None = None, these: Processes | None = None
) -> TextSource:
    """Any source but a reward stage and a model.

    Args:
        tokenizer: the policy's, for servers that are told tokens as text.
        these: as of `build_scorers`.

    Raises:
        UserError: a source that cannot score.
    """
    scorer = OPENERS[source.kind](source.opening(f"reward {source.name}", tokenizer))
    if these is not None and these.count > 1 and source.kind in SERVERS:
        scorer = AskedOnce(scorer, these)
    return TextSource(source, scorer)


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


def _path(source: RewardSource) -> Path:
    return Path(str(source.target))


class ScoreSettings(Protocol):
    """The settings that a `Scoring` reads."""

    normalize_rewards: bool
    reward_scale: Literal["none", "std", "running"]
    reward_clip: float | None
    reward_combination: Literal["sum", "ensemble"]
    ensemble_penalty: float
    missing_eos_penalty: float | None
    missing_eos_score: float | None


class Scores(NamedTuple):
    """What a batch of responses got.

    total_B: one score a response, combined, scaled and clipped, the rule of a missing EOS applied.
    parts_SB: of each source, centred; NaN where it does not apply.
    """

    total_B: torch.Tensor
    parts_SB: torch.Tensor


class Scoring:
    """Every source's raw scores, centred and combined, scaled, clipped; then what a missing EOS does.

    Attributes:
        running: the running scale, a part of the checkpoint.
    """

    def __init__(
        self, config: ScoreSettings, sources: Sequence[RewardSource], scorers: Sequence[Scorer], reduce: Reduce
    ) -> None:
        self.config, self.sources, self.scorers, self.reduce = config, sources, scorers, reduce
        self.running = RunningScale()

    def __call__(self, responses: Responses, *, training: bool = True) -> torch.Tensor:
        """One score a response, fp32 [B], on the episodes' device; `training` as in `scores`."""
        return self.scores(responses, training=training).total_B

    def scores(self, responses: Responses, *, training: bool = True) -> Scores:
        """The same beside each source's own, fp32, on the episodes' device; zeros where there is no source.

        Args:
            training: False: the running scale learns nothing of them, and neither it nor the clip behind it applies.
        """
        config, device = self.config, responses.episodes.start_B.device
        if not self.scorers:
            none_B = torch.zeros(len(responses.episodes), device=device)
            return Scores(none_B, none_B[None, :][:0])
        parts = []
        for scorer in self.scorers:
            scores_B = scorer(responses).to(device)
            if scorer.normal is not None and config.normalize_rewards:
                mean, std = scorer.normal
                scores_B = (scores_B - mean) / (std if config.reward_scale == "std" else 1.0)
            parts.append(scores_B)
        parts_SB = torch.stack(parts)
        scores_B = combine(
            parts_SB, self.weights(device), how=config.reward_combination, penalty=config.ensemble_penalty
        )
        running = config.reward_scale == "running"
        if running and training:
            moments = masked_moments(scores_B, torch.ones_like(scores_B, dtype=torch.bool))
            self.running.update(self.reduce(moments, "sum"))
            scores_B = scores_B / self.running.std
        if config.reward_clip is not None and (training or not running):
            scores_B = scores_B.clamp(-config.reward_clip, config.reward_clip)
        total_B = apply_eos_rule(
            scores_B,
            responses.episodes.finished_B,
            penalty=config.missing_eos_penalty,
            replacement=config.missing_eos_score,
        )
        return Scores(total_B, parts_SB)

    def weights(self, device: torch.device) -> torch.Tensor:
        """The sources' weights [S]."""
        return torch.tensor([source.weight for source in self.sources], device=device)
