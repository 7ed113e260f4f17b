"""Rollouts: prompts, what the policy answered, and every number about it that the update needs.

Rows are prompt + response, padded on the RIGHT only: under causal attention nothing to the right of a token changes its
hidden state, so padding can never reach a log-prob, a value or a score.

Legend of shape suffixes: B rows (episodes of this process), T positions of prompt + response, R response positions.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Protocol

import numpy
import torch
from transformers import PreTrainedTokenizerBase

from ...data.rows import Message
from ...data.template import prompt_ids
from ...errors import UserError
from ...models.adapters import AdapterSet
from ...models.batching import token_batches
from ...models.generate import Generation, sample
from ...models.logprobs import ResponseTokens, response_positions
from ...models.masked import masked_mean, masked_moments, masked_sum, mean_and_variance
from ...models.memory import release_free_memory
from ...models.prefix_tree import Integers, Layout, Rows
from ...models.sharded import whole_layers
from ...models.tokens import end_token_ids
from ...models.transfer import to_device

PromptText = str | list[Message]
"""A prompt as the data have it: text, or messages."""

Reduce = Callable[[torch.Tensor, str], torch.Tensor]
"""Over all processes: adds a tensor up ("sum"), or takes the largest ("max")."""

_OURS = ("prompt", "prompt_ids", "columns", "completion_ids")


@dataclass(frozen=True)
class Prompts:
    """ids: token ids, ready to be answered. prompts: text or messages. columns: what rewards also read. rows: their
    places in the data. replies: token ids of the data's own replies (column `completion_ids`); None where one has none.
    """

    ids: list[list[int]]
    prompts: list[PromptText]
    columns: list[dict[str, object]]
    rows: list[int] = field(default_factory=list)
    replies: list[list[int] | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(
        cls, dataset: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str = "train_dataset"
    ) -> "Prompts":
        """From rows with `prompt` (text, or a list of messages) or `prompt_ids` made beforehand; others are columns.

        Args:
            where: what the rows are called in errors.

        Raises:
            UserError: no row, a row without a prompt, or an empty one.
        """
        ids: list[list[int]] = []
        prompts: list[PromptText] = []
        columns: list[dict[str, object]] = []
        replies: list[list[int] | None] = []
        for number, row in enumerate(dataset):
            if "prompt" not in row and "prompt_ids" not in row:
                raise UserError(
                    f"{where} row {number}",
                    f"its columns are {', '.join(row)}, expected 'prompt' or 'prompt_ids'",
                    "rename the prompt's column",
                )
            tokens = list(row["prompt_ids"]) if "prompt_ids" in row else _encode(row["prompt"], tokenizer)
            if not tokens:
                raise UserError(f"{where} row {number}", "the prompt is empty", "remove the row")
            ids.append(tokens)
            prompts.append(row["prompt"] if "prompt" in row else str(tokenizer.decode(tokens)))
            extra = json.loads(row["columns"]) if isinstance(row.get("columns"), str) else {}
            replies.append(None if row.get("completion_ids") is None else list(row["completion_ids"]))
            columns.append({**extra, **{name: value for name, value in row.items() if name not in _OURS}})
        if not ids:
            raise UserError(where, "it has no row", "give at least one prompt")
        return cls(ids, prompts, columns, list(range(len(ids))), replies)

    def take(self, rows: Sequence[int]) -> "Prompts":
        """The given rows, in that order."""
        return Prompts(
            [self.ids[i] for i in rows],
            [self.prompts[i] for i in rows],
            [self.columns[i] for i in rows],
            [self.rows[i] for i in rows],
            [self.replies[i] for i in rows] if self.replies else [],
        )

    def column_lists(self) -> dict[str, list[object]]:
        """Columns as lists, None where a row has none: what a reward function is called with."""
        names = dict.fromkeys(name for row in self.columns for name in row)
        return {name: [row.get(name) for row in self.columns] for name in names}


def stream_rows(size: int, seed: int, start: int, count: int) -> list[int]:
    """Positions start .. start + count - 1 of the endless stream of permutations of `size` rows.

    A function of its arguments alone, so a resumed run needs to know its position and nothing else.
    """
    orders: dict[int, list[int]] = {}
    rows = []
    for position in range(start, start + count):
        lap, place = divmod(position, size)
        if lap not in orders:
            generator = torch.Generator().manual_seed(seed_of(seed, "prompts", lap))
            orders[lap] = torch.randperm(size, generator=generator).tolist()
        rows.append(orders[lap][place])
    return rows


def seed_of(*parts: int | str) -> int:
    """A seed below 2^56 named by its parts: streams with different names share nothing."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def _encode(prompt: PromptText, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
        eos = tokenizer.eos_token
        # some tokenizers end every text in EOS: a reply goes on where the prompt ends
        adds_eos = ids[-1:] == [tokenizer.eos_token_id] and not (isinstance(eos, str) and prompt.endswith(eos))
        return ids[:-1] if adds_eos else ids
    return list(prompt_ids(tokenizer, prompt))


@dataclass(frozen=True)
class Episodes:
    """What was sampled.

    input_ids_BT: int64, prompt then response, then padding.
    start_B: int64, where each response starts (the prompt's length).
    length_B: int64, response tokens, EOS included.
    finished_B: bool, whether the response ended in EOS.
    sampler_logps_BR: fp32, the sampler's own log-probs; only for comparison.

    Shapes, masks and layouts are worked out in the processor's memory (`host`): a GPU that is asked for them is waited
    for.
    """

    input_ids_BT: torch.Tensor
    start_B: torch.Tensor
    length_B: torch.Tensor
    finished_B: torch.Tensor
    sampler_logps_BR: torch.Tensor

    def __len__(self) -> int:
        return len(self.start_B)

    @cached_property
    def host(self) -> "OnHost":
        """The same in the processor's memory. On a CPU it is the same memory."""
        ids_BT, start_B, length_B = (x.cpu().numpy() for x in (self.input_ids_BT, self.start_B, self.length_B))
        return OnHost(ids_BT, start_B, length_B)

    @property
    def mask_BR(self) -> torch.Tensor:
        """True on response tokens, the first stop token included, nothing after it."""
        return response_positions(self.start_B, self.length_B, self.host.longest)[1]

    @property
    def tokens(self) -> ResponseTokens:
        """Where the response tokens stand."""
        host = self.host
        return ResponseTokens.of(host.start_B, host.length_B, self.input_ids_BT.shape, self.start_B.device)

    @property
    def attention_mask_BT(self) -> torch.Tensor:
        """1 on prompt and response tokens; by length, so a PAD that equals EOS cannot be mistaken."""
        step_T = torch.arange(self.input_ids_BT.shape[1], device=self.start_B.device)
        return (step_T < (self.start_B + self.length_B)[:, None]).long()

    def rows(self, index: torch.Tensor) -> "Episodes":
        """The given rows, cut to their own longest row and longest response.

        Args:
            index: best in the processor's memory.
        """
        host = self.host.take(index.cpu().numpy())
        here = to_device(index, self.start_B.device)
        part = Episodes(
            self.input_ids_BT[here, : host.ids_BT.shape[1]],
            self.start_B[here],
            self.length_B[here],
            self.finished_B[here],
            self.sampler_logps_BR[here, : host.longest],
        )
        part.__dict__["host"] = host  # known, so never asked for
        return part

    def responses(self) -> list[list[int]]:
        """Token ids of each response, EOS included."""
        return [
            row[start : start + length].tolist()
            for row, start, length in zip(
                self.host.ids_BT, self.host.start_B.tolist(), self.host.length_B.tolist(), strict=True
            )
        ]


class OnHost:
    """Episodes in the processor's memory, and the prefix trees that were laid out of some of them.

    The layouts stay as long as the whole rollout: the same rows are forwarded under several adapters, in every epoch.

    Args:
        layouts, rows: of the whole rollout, and which of its rows these are; None: these are the whole.
    """

    def __init__(
        self,
        ids_BT: Integers,
        start_B: Integers,
        length_B: Integers,
        layouts: dict[Any, Layout] | None = None,
        rows: Integers | None = None,
    ) -> None:
        self.ids_BT, self.start_B, self.length_B = ids_BT, start_B, length_B
        self._layouts: dict[Any, Layout] = {} if layouts is None else layouts
        self._rows = numpy.arange(len(start_B)) if rows is None else rows

    @property
    def longest(self) -> int:
        """Tokens of the longest response."""
        return int(self.length_B.max())

    @property
    def total_B(self) -> Integers:
        """Tokens of each row, prompt and response."""
        return self.start_B + self.length_B

    def take(self, index: Integers) -> "OnHost":
        """The given rows, cut to their own longest row."""
        width = int(self.total_B[index].max())
        ids_BT = self.ids_BT[index, :width]
        return OnHost(ids_BT, self.start_B[index], self.length_B[index], self._layouts, self._rows[index])

    @cached_property
    def forward_rows(self) -> Rows:
        """What a packed forward of them is laid out by."""
        total_B = self.total_B
        mask_BT = numpy.arange(self.ids_BT.shape[1]) < total_B[:, None]
        return Rows(self.ids_BT, mask_BT, self._layouts, (self._rows.tobytes(), total_B.tobytes()))


@dataclass(frozen=True)
class Rollout:
    """Episodes with everything the minibatch epochs read; all fp32, zero outside the mask.

    logps_BR, ref_logps_BR: log-probs of the sampled tokens under old policy and reference, by the training forward;
        None where no KL is measured.
    advantages_BR: what the method's estimator made of the rewards.
    scores_B: the score that landed on each last token.
    values_BR, returns_BR: the value of the state before each token, and what it is to become (see `advantages.gae`);
        None of a method without a value.
    entropy_BR: the old policy's; None where the method does not ask for it.
    """

    episodes: Episodes
    logps_BR: torch.Tensor
    ref_logps_BR: torch.Tensor | None
    advantages_BR: torch.Tensor
    scores_B: torch.Tensor
    values_BR: torch.Tensor | None = None
    returns_BR: torch.Tensor | None = None
    entropy_BR: torch.Tensor | None = None

    def rows(self, index: torch.Tensor) -> "Rollout":
        """The given rows, cut to their own longest row and longest response."""
        episodes, here = self.episodes.rows(index), to_device(index, self.scores_B.device)
        r = episodes.sampler_logps_BR.shape[1]
        cut: dict[str, Any] = {"ref_logps_BR": None}
        cut |= {name: x[here, :r] if x.dim() > 1 else x[here] for name, x in self._own().items()}
        return Rollout(episodes, **cut)

    def measured(self, index: torch.Tensor, part: "Rollout") -> None:
        """Take the old policy's log-probs and entropies of these rows from `part`, which `rows` gave."""
        assert self.entropy_BR is not None and part.entropy_BR is not None
        here, r = to_device(index, self.scores_B.device), part.logps_BR.shape[1]
        self.logps_BR[here, :r], self.entropy_BR[here, :r] = part.logps_BR, part.entropy_BR

    def tensors(self) -> dict[str, torch.Tensor]:
        """Flat, for a checkpoint."""
        return self._own() | {f"episodes.{f.name}": getattr(self.episodes, f.name) for f in fields(self.episodes)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], device: torch.device) -> "Rollout":
        """What `tensors` gave."""
        moved: dict[str, Any] = {"ref_logps_BR": None}
        moved |= {name: tensor.to(device) for name, tensor in tensors.items()}
        episodes = Episodes(**{f.name: moved.pop(f"episodes.{f.name}") for f in fields(Episodes)})
        return cls(episodes, **moved)

    def kl_B(self) -> torch.Tensor | None:
        """Estimate of each response's KL to the reference, nats, by the sampled tokens [B]."""
        if self.ref_logps_BR is None:
            return None
        return masked_sum(self.logps_BR - self.ref_logps_BR, self.episodes.mask_BR, 1)

    def _own(self) -> dict[str, torch.Tensor]:
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "episodes"}
        return {name: x for name, x in given.items() if x is not None}


def make_episodes(
    prompts: Sequence[Sequence[int]], generation: Generation, pad_token_id: int, device: torch.device
) -> Episodes:
    """Lay prompts and their completions out as right-padded rows.

    Raises:
        ValueError: a completion without a token (there is nothing to score or to train on).
    """
    rows = [torch.tensor([*prompt, *tokens]) for prompt, tokens in zip(prompts, generation.tokens, strict=True)]
    if any(not tokens for tokens in generation.tokens):
        raise ValueError("a completion has no token, expected at least EOS; is max_new_tokens at least 1?")
    logps = [torch.tensor(row, dtype=torch.float32) for row in generation.logprobs]
    pad = torch.nn.utils.rnn.pad_sequence
    return Episodes(
        pad(rows, batch_first=True, padding_value=pad_token_id).to(device),
        torch.tensor([len(prompt) for prompt in prompts], device=device),
        torch.tensor([len(tokens) for tokens in generation.tokens], device=device),
        torch.tensor(generation.finished, dtype=torch.bool, device=device),
        pad(logps, batch_first=True).to(device),
    )


def forward_batches(episodes: Episodes, max_tokens: int, group: int = 1) -> list[torch.Tensor]:
    """All rows in forwards of at most so many padded tokens, like lengths together; in the processor's memory.

    Args:
        group: so many rows that follow each other answer one prompt: they go through together, where they fit.
    """
    total_B = episodes.host.total_B
    if group > 1:
        widest_P = total_B.reshape(-1, group).max(1)
        if int(widest_P.max()) * group <= max_tokens:
            found = token_batches(widest_P.tolist(), max_tokens // group)
            return [(torch.tensor(each)[:, None] * group + torch.arange(group)).flatten() for each in found]
    return [torch.tensor(rows) for rows in token_batches(total_B.tolist(), max_tokens)]


def micro_batches(episodes: Episodes, rows: torch.Tensor, size: int, group: int = 1) -> list[torch.Tensor]:
    """Split `rows` into forwards of `size` sequences of like length, to pad little; all in the processor's memory.

    Every number and every summed loss is per row, so the split changes nothing but the time.

    Args:
        group: so many rows that follow each other in `rows` answer one prompt. As many whole groups as `size` has room
            for go through together; one that is larger is split, and shares its forwards with no other.
    """
    rows_PN = rows.cpu().view(-1, group)
    total_PN = episodes.host.total_B[rows_PN.numpy()]
    rows_PN = rows_PN[torch.from_numpy(numpy.argsort(-total_PN.max(1), kind="stable"))]
    if group <= size:
        return [each.flatten() for each in rows_PN.split(size // group)]
    return [part for each in rows_PN for part in micro_batches(episodes, each, size)]


class Sampling(Protocol):
    """The settings that sampling reads."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    rollout_micro_batch_size: int | None


def generate(
    adapters: AdapterSet,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    config: Sampling,
    *,
    seed: int,
    first: int = 0,
    device: torch.device,
    on_batch: Callable[[int], None] | None = None,
) -> Episodes:
    """One response of the policy to each prompt.

    Args:
        first: the place of the first of these prompts among those of all processes: what is drawn goes by it.
        on_batch: called with the number of responses done so far.
    """
    ends = end_token_ids(tokenizer, adapters.model)
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    assert isinstance(pad, int)
    release_free_memory()  # here and below: no phase grows on top of what another one left
    with whole_layers(adapters.backbone):
        generation = sample(
            adapters,
            "default",
            prompts.ids,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            eos_token_id=ends,
            pad_token_id=pad,
            seed=seed,
            first=first,
            batch_size=config.rollout_micro_batch_size,
            on_batch=on_batch,
        )
    release_free_memory()
    return make_episodes(prompts.ids, generation, pad, device)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[list[int]]) -> list[str]:
    """Responses as text, special tokens left out."""
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in ids]


def global_moments(x_BR: torch.Tensor, mask_BR: torch.Tensor, reduce: Reduce) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance over the valid tokens of all processes."""
    return mean_and_variance(reduce(masked_moments(x_BR, mask_BR), "sum"))


SCORED = (
    "objective/scores", "objective/scores_std", "objective/rlhf_reward", "objective/non_score_reward",
)  # fmt: skip
"""Of `rollout_metrics`, what says nothing where nothing scores."""
SAMPLED = (
    "rollout/logprob_mismatch", "rollout/logprob_mismatch_mean", "rollout/sampler_kl", "rollout/tokens_per_second",
)  # fmt: skip
"""What says nothing of responses that the policy did not sample."""


def rollout_metrics(
    rollout: Rollout, non_score_BR: torch.Tensor, entropy_BR: torch.Tensor, reduce: Reduce, n: int
) -> dict[str, float]:
    """Means over the n episodes of all processes (of sums over valid tokens), under their logged names."""
    episodes, mask_BR = rollout.episodes, rollout.episodes.mask_BR
    non_score_B = masked_sum(non_score_BR, mask_BR, 1)
    kl_B = rollout.kl_B()
    per_episode = {
        **({} if kl_B is None else {"objective/kl": kl_B}),
        "objective/entropy": masked_sum(-rollout.logps_BR, mask_BR, 1),
        "objective/non_score_reward": non_score_B,
        "objective/rlhf_reward": non_score_B + rollout.scores_B,
        "objective/scores": rollout.scores_B,
        "rollout/length": episodes.length_B,
        "rollout/eos_rate": episodes.finished_B,
        "rollout/entropy_per_token": masked_mean(entropy_BR, mask_BR, 1),
        "scores_squared": rollout.scores_B.square(),
    }
    sums = reduce(torch.stack([x.double().sum() for x in per_episode.values()]), "sum")
    metrics = {name: float(total) / n for name, total in zip(per_episode, sums, strict=True)}
    variance = metrics.pop("scores_squared") - metrics["objective/scores"] ** 2
    metrics["objective/scores_std"] = max(variance, 0) ** 0.5
    metrics["val/num_eos_tokens"] = metrics["rollout/eos_rate"] * n
    return metrics | sampler_metrics(rollout, reduce)


def sampler_metrics(rollout: Rollout, reduce: Reduce) -> dict[str, float]:
    """How far the sampler's log-probs are from the training forward's, over the tokens of all processes, in nats.

    The largest gap and the mean one; and KL(sampler || trainer) per token by the estimator k3, exp(d) - 1 - d with d =
    log pi_trainer - log pi_sampler, which is never negative (http://joschu.net/blog/kl-approx.html).
    """
    mask_BR = rollout.episodes.mask_BR
    gap_BR = torch.where(mask_BR, rollout.logps_BR - rollout.episodes.sampler_logps_BR, 0.0)
    sums = torch.stack([gap_BR.abs().double().sum(), (gap_BR.double().expm1() - gap_BR).sum(), mask_BR.double().sum()])
    mean, kl, tokens = reduce(sums, "sum").tolist()
    return {
        "rollout/logprob_mismatch": float(reduce(gap_BR.abs().max(), "max")),
        "rollout/logprob_mismatch_mean": mean / tokens,
        "rollout/sampler_kl": kl / tokens,
    }


def sample_rows(prompts: Prompts, texts: Sequence[str], rollout: Rollout, count: int) -> list[dict[str, object]]:
    """The first `count` generations with their numbers, for rollouts.jsonl."""
    kl_B = rollout.kl_B()
    return [
        {
            "prompt": prompts.prompts[i],
            "completion": texts[i],
            "score": float(rollout.scores_B[i]),
            **({} if kl_B is None else {"kl": float(kl_B[i])}),
            "length": int(rollout.episodes.length_B[i]),
            "finished": bool(rollout.episodes.finished_B[i]),
        }
        for i in range(min(count, len(texts)))
    ]
