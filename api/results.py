"""What the calls return: frozen records, each with `to_pandas()`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, nearest
from ..files import BENCHMARKS, EVALUATION, LOG, OVER_OPTIMISATION, REPORT, RESULTS, REWARDS, SAMPLES, json_objects
from ..intact import read_json, read_json_object

if TYPE_CHECKING:
    from pandas import DataFrame

Prompt = str | list[dict[str, Any]]
"""Text, which is one message of the user's, or a conversation: messages with `role` and `content`."""


@dataclass(frozen=True)
class StageResult:
    """A finished stage.

    Attributes:
        name, kind: in the recipe; sft, reward, dpo, kto, ppo, or a method's own.
        path: its folder: an adapter that plain PEFT loads, with its tokenizer and lineage.json.
        state: "ran", or "skipped" where nothing had changed.
        seconds: how long it took, when it ran.
        metrics: what metrics.json holds: `train_seconds`, `tokens_per_second`, losses, `objective/kl` in nats, ...
    """

    name: str
    kind: str
    path: Path
    state: str
    seconds: float
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def to_pandas(self) -> "DataFrame":
        """Its curves: one row a log entry, with `step` in optimiser steps."""
        file = self.path / LOG
        return _frame(json_objects(file.read_text(encoding="utf-8")) if file.is_file() else [])


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found.

    Attributes:
        rows: one per policy and judge, as in results.json: `policy`, `reference`, `judge`, `n`, `win_rate`, `ci_low`,
            `ci_high` (fractions of 1), `length` in tokens, `kl` in nats a reply, `temperature`, `seed`, ...; None where
            something was not measured.
        samples: one per policy and prompt: `policy`, `prompt_index`, `prompt`, `completion`, `tokens`, `finished`,
            `scores` and `outcomes` by judge.
        reward_models: one per reward model measured on pairs that its training left out.
        over_optimisation, benchmarks: the content of those files, where the recipe asks for it.
    """

    rows: tuple[Mapping[str, Any], ...]
    samples: tuple[Mapping[str, Any], ...] = ()
    reward_models: tuple[Mapping[str, Any], ...] = ()
    over_optimisation: Mapping[str, Any] | None = None
    benchmarks: Mapping[str, Any] | None = None

    def to_pandas(self) -> "DataFrame":
        """`rows` as a table."""
        return _frame(self.rows)

    def samples_to_pandas(self) -> "DataFrame":
        """`samples` as a table."""
        return _frame(self.samples)

    @classmethod
    def of_run(cls, run: Path) -> "EvaluationResult | None":
        """What lies in RUN/eval; None where nothing does."""
        folder = run / EVALUATION
        if not (folder / RESULTS).is_file():
            return None
        samples = folder / SAMPLES
        lines = json_objects(samples.read_text(encoding="utf-8")) if samples.is_file() else []
        others = [read_json_object(folder / name) or None for name in (OVER_OPTIMISATION, BENCHMARKS)]
        return cls(_rows(folder / RESULTS), tuple(lines), _rows(folder / REWARDS), *others)


@dataclass(frozen=True)
class RunResult:
    """A run of a recipe.

    Attributes:
        path: its folder, for `load_policy`, `evaluate`, and every command of `preftune`.
        stages: those that were asked for, in order.
        evaluation: None where it was not asked for.
        problems: what did not come out as asked without being an error, a judge that gave no verdict say.
    """

    path: Path
    stages: tuple[StageResult, ...]
    evaluation: EvaluationResult | None = None
    problems: tuple[str, ...] = ()

    @property
    def report(self) -> Path:
        """The page that shows all of it."""
        return self.path / REPORT

    def __getitem__(self, stage: str) -> StageResult:
        found = next((each for each in self.stages if each.name == stage), None)
        if found is None:
            raise UserError(f"run[{stage!r}]", "no such stage", nearest(stage, [each.name for each in self.stages]))
        return found

    def to_pandas(self) -> "DataFrame":
        """One row a stage: name, kind, state, seconds and its metrics."""
        return _frame(
            {"stage": each.name, "kind": each.kind, "state": each.state, "seconds": each.seconds}
            | {name: value for name, value in each.metrics.items() if not isinstance(value, Mapping | list)}
            for each in self.stages
        )


@dataclass(frozen=True)
class Generations:
    """Replies of a policy, in the order of the prompts. Counts, indexes and iterates as a list of texts.

    Attributes:
        policy: its name.
        prompts: as they were given.
        completions: the replies as text, without special tokens.
        token_ids: of each reply, the token that ended it included.
        finished: whether it ended by itself; False: it was cut at `max_new_tokens`.
        prompt_ids: token ids that were answered, the chat template's included.
    """

    policy: str
    prompts: tuple[Prompt, ...]
    completions: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    finished: tuple[bool, ...]
    prompt_ids: tuple[tuple[int, ...], ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.completions)

    def __iter__(self) -> Iterator[str]:
        return iter(self.completions)

    def __getitem__(self, index: int) -> str:
        return self.completions[index]

    def to_pandas(self) -> "DataFrame":
        """One row a reply; `tokens` is its length."""
        columns = zip(self.prompts, self.completions, self.token_ids, self.finished, strict=True)
        return _frame(
            {"policy": self.policy, "prompt": prompt, "completion": text, "tokens": len(ids), "finished": finished}
            for prompt, text, ids, finished in columns
        )


@dataclass(frozen=True)
class Scores:
    """Rewards of replies, in their order. Counts, indexes and iterates as a list of numbers.

    Attributes:
        reward: the reward stage's name.
        prompts, completions: what was scored.
        values: the raw score that the head gives at the reply's last token; only differences mean something.
    """

    reward: str
    prompts: tuple[Prompt, ...]
    completions: tuple[str, ...]
    values: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[float]:
        return iter(self.values)

    def __getitem__(self, index: int) -> float:
        return self.values[index]

    def to_pandas(self) -> "DataFrame":
        """One row a reply."""
        columns = zip(self.prompts, self.completions, self.values, strict=True)
        return _frame({"prompt": prompt, "completion": text, "score": value} for prompt, text, value in columns)


@dataclass(frozen=True)
class KLResult:
    """KL(policy || reference) in nats, on replies that the policy drew.

    Attributes:
        policy, reference: names.
        per_reply, per_reply_se: mean over replies, and its standard error.
        per_token, per_token_se: all nats over all tokens; the standard error has replies as units.
        temperature: of both distributions, and of the drawing.
        values: of each reply. tokens: its length.
        generations: the replies.
    """

    policy: str
    reference: str
    per_reply: float
    per_reply_se: float
    per_token: float
    per_token_se: float
    temperature: float
    values: tuple[float, ...] = field(repr=False)
    generations: Generations = field(repr=False)

    def to_pandas(self) -> "DataFrame":
        """One row a reply: prompt, completion, tokens, kl in nats."""
        return self.generations.to_pandas().assign(reference=self.reference, kl=list(self.values))


def _frame(rows: Any) -> "DataFrame":
    from pandas import DataFrame

    return DataFrame([dict(row) for row in rows])


def _rows(file: Path) -> tuple[Mapping[str, Any], ...]:
    found = read_json(file)
    return tuple(row for row in found if isinstance(row, dict)) if isinstance(found, list) else ()
