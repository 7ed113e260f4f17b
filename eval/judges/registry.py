"""Judges: what gives a reply a score.

A recipe lists judges as mappings with a `kind`; `plan_judges` checks them before any model is loaded, and opens them
once the base is there. People, and an endpoint asked to, compare two replies; all others score one at a time, so that
the order of two replies cannot matter. A model that reads both at once goes through `winrate.order_outcomes`.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import UserError
from ...models.adapters import AdapterSet
from ...models.batching import TOKENS_PER_BATCH, right_pad, token_batches
from ...models.heads import score_at
from ...stages.ppo.rewards import import_function
from ..chat.votes import read_votes
from ..samples import Sample
from ..spec import check_adapter
from .endpoint_judge import ENDPOINT_FIELDS, plan_endpoint
from .human import HumanJudge
from .model_judge import MODEL_FIELDS, plan_model
from .rubric import Rubric, parse_rubric
from .verdicts import Judge, JudgePlan


@dataclass(frozen=True)
class RubricJudge:
    """The share of a rubric's checks that the reply's text passes, in [0, 1]."""

    name: str
    rubric: Rubric

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [self.rubric.score(sample.completion) for sample in samples]


@dataclass(frozen=True)
class RewardJudge:
    """The raw score of a reward stage's adapter, read at the reply's last token (the EOS where it was reached).

    Attributes:
        role: the reward adapter's name in `adapters`; its score head lies beside it.
    """

    name: str
    adapters: AdapterSet
    role: str
    pad_token_id: int

    def score(self, samples: Sequence[Sample]) -> list[float]:
        rows = [[*sample.prompt.ids, *sample.tokens] for sample in samples]
        return reward_scores(self.adapters, self.role, rows, self.pad_token_id)


@dataclass(frozen=True)
class FunctionJudge:
    """A Python function with TRL's reward-function signature: `function(prompts, completions, **columns)`.

    Prompts are lists of messages and completions lists of one assistant message, as TRL hands over conversations.
    None from the function means that it has no score for that sample.
    """

    name: str
    function: Callable[..., Sequence[float | None]]
    where: str

    def score(self, samples: Sequence[Sample]) -> list[float]:
        shared = set(samples[0].prompt.columns) if samples else set()
        for sample in samples:
            shared &= set(sample.prompt.columns)
        given = {
            **{key: [sample.prompt.columns[key] for sample in samples] for key in sorted(shared)},
            "prompts": [sample.prompt.messages for sample in samples],
            "completions": [[{"role": "assistant", "content": sample.completion}] for sample in samples],
            "completion_ids": [sample.tokens for sample in samples],
        }
        parameters = inspect.signature(self.function).parameters
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            given = {key: value for key, value in given.items() if key in parameters}
        scores = self.function(**given)
        if len(scores) != len(samples):
            raise UserError(
                self.where,
                f"the function returned {len(scores)} scores for {len(samples)} completions",
                "return one number (or None) for each completion",
            )
        return [math.nan if score is None else float(score) for score in scores]


@torch.no_grad()
def reward_scores(
    adapters: AdapterSet,
    role: str,
    rows: Sequence[Sequence[int]],
    pad_token_id: int,
    *,
    max_tokens: int = TOKENS_PER_BATCH,
    on_batch: Callable[[int], None] | None = None,
) -> list[float]:
    """Raw reward of each row of token ids (prompt and response), read at its last token; in the rows' order."""
    scores = [0.0] * len(rows)
    done = 0
    device = next(adapters.model.parameters()).device
    for batch in token_batches([len(row) for row in rows], max_tokens):
        ids_BL, mask_BL = right_pad([rows[i] for i in batch], pad_token_id, device)
        hidden_BLH = adapters.hidden(role, ids_BL, mask_BL)
        score_B = score_at(adapters.heads[role], hidden_BLH, mask_BL.sum(-1) - 1)
        for i, score in zip(batch, score_B.tolist(), strict=True):
            scores[i] = score
        done += len(batch)
        if on_batch is not None:
            on_batch(done)
    return scores


def plan_judges(raw: Sequence[Mapping[str, Any]], run_dir: Path | None, where: str = "eval.judges") -> list[JudgePlan]:
    """Checks a recipe's judges.

    Args:
        raw: mappings `{kind: rubric, checks: [...]}`, `{kind: reward, stage: NAME}` or `{kind: reward, adapter: DIR}`,
            `{kind: function, function: "module:function"}`, `{kind: human, votes: FILE}` (see `human.py`),
            `{kind: model, model: FOLDER_OR_HUB_ID}` (see `model_judges.py`), `{kind: endpoint, url: ..., model: NAME}`
            (see `endpoint_judges.py`), each with an optional `name`.
        run_dir: the run folder, in which a reward judge's stage is looked up, and a file of votes or a model's folder
            before they are looked up from here; an endpoint's answers are kept in it.

    Raises:
        UserError: for an unknown kind, a missing or unknown field, a name given twice.
    """
    plans = [_plan(dict(entry), f"{where}[{place}]", run_dir) for place, entry in enumerate(raw)]
    names = [plan.name for plan in plans]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(where, f"two judges are called {twice!r}", "give each judge its own name")
    return plans


def _plan(entry: dict[str, Any], where: str, run_dir: Path | None) -> JudgePlan:
    kind = entry.get("kind")
    if kind not in _KINDS:
        raise UserError(where, f"kind is {kind!r}, expected one of {', '.join(_KINDS)}", "correct the kind")
    fields, plan = _KINDS[kind]
    for key in entry:
        if key not in {"kind", "name", *fields}:
            raise UserError(where, f"a {kind} judge takes no {key!r}", f"it takes name, {', '.join(fields)}")
    return plan({key: value for key, value in entry.items() if value is not None}, where, run_dir)


def _plan_rubric(entry: dict[str, Any], where: str, run_dir: Path | None) -> JudgePlan:
    del run_dir
    judge = RubricJudge(entry.get("name", "rubric"), parse_rubric(entry.get("checks"), where))
    return JudgePlan(judge.name, lambda adapters, tokenizer: judge)


def _plan_reward(entry: dict[str, Any], where: str, run_dir: Path | None) -> JudgePlan:
    if ("adapter" in entry) == ("stage" in entry):
        raise UserError(where, "a reward judge needs a stage or an adapter folder, not both", "write stage: reward")
    if "adapter" in entry:
        folder = Path(entry["adapter"])
    elif run_dir is None:
        raise UserError(where, f"stage {entry['stage']!r} without a run folder", "give adapter: DIR")
    else:
        folder = run_dir / entry["stage"]
    name = entry.get("name", entry.get("stage", "reward"))

    def open_judge(adapters: AdapterSet, tokenizer: Any) -> Judge:
        check_adapter(folder, adapters.base, tokenizer)
        role = f"judge_{name.replace('.', '_')}"
        adapters.load(role, folder)
        if role not in adapters.heads:
            raise UserError(where, f"{folder} has no score head", "name a stage of kind reward")
        return RewardJudge(name, adapters, role, tokenizer.pad_token_id)

    return JudgePlan(name, open_judge)


def _plan_function(entry: dict[str, Any], where: str, run_dir: Path | None) -> JudgePlan:
    del run_dir
    target = entry.get("function")
    try:
        function = import_function(str(target or ""))
    except UserError as error:
        raise UserError(f"{where}.function", f"{target!r} {error.problem}", error.remedy) from None
    judge = FunctionJudge(entry.get("name", str(target).partition(":")[2]), function, where)
    return JudgePlan(judge.name, lambda adapters, tokenizer: judge)


def _plan_human(entry: dict[str, Any], where: str, run_dir: Path | None) -> JudgePlan:
    named = entry.get("votes")
    if not isinstance(named, str):
        raise UserError(f"{where}.votes", f"is {named!r}, expected a file", "write votes: votes.jsonl")
    places = [folder / Path(named).expanduser() for folder in (run_dir, Path()) if folder is not None]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        looked = ", ".join(str(place.parent) for place in places)
        raise UserError(f"{where}.votes", f"no file {named!r} (looked in {looked})", "correct the path")
    judge = HumanJudge(entry.get("name", "human"), read_votes(file))
    return JudgePlan(judge.name, lambda adapters, tokenizer: judge)


_KINDS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any], str, Path | None], JudgePlan]]] = {
    "rubric": (("checks",), _plan_rubric),
    "reward": (("stage", "adapter"), _plan_reward),
    "function": (("function",), _plan_function),
    "human": (("votes",), _plan_human),
    "model": (MODEL_FIELDS, plan_model),
    "endpoint": (ENDPOINT_FIELDS, plan_endpoint),
}
