"""A Python function as a judge: `{kind: function, function: "module:function"}` (see `stages/reward_functions.py`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.fingerprints import code_sha256
from ...stages.reward_functions import RewardFunction, call_reward_function, check_signature, import_function
from ..samples import Sample
from .judge import JudgePlan
from .kinds import Entry
from .names import judge_name


@dataclass(frozen=True)
class FunctionJudge:
    """A function with TRL's reward-function signature; where it returns None it has no score for that sample.

    Prompts are lists of messages and completions lists of one assistant message, as TRL hands over conversations.
    """

    name: str
    function: RewardFunction
    where: str

    def score(self, samples: Sequence[Sample]) -> list[float]:
        shared = set(samples[0].prompt.columns) if samples else set()
        for sample in samples:
            shared &= set(sample.prompt.columns)
        return call_reward_function(
            self.function,
            where=self.where,
            prompts=[sample.prompt.messages for sample in samples],
            completions=[[{"role": "assistant", "content": sample.completion}] for sample in samples],
            completion_ids=[sample.tokens for sample in samples],
            columns={key: [sample.prompt.columns[key] for sample in samples] for key in sorted(shared)},
        )


def plan(entry: dict[str, Any], where: str, run_dir: Path | None) -> JudgePlan:
    """Checks the recipe's entry: `function`.

    Raises:
        UserError: no such module or function.
    """
    del run_dir
    target = entry.get("function")
    function = import_function(str(target or ""), f"{where}.function")
    check_signature(function, f"{where}.function")
    judge = FunctionJudge(judge_name(entry), function, where)
    return JudgePlan(judge.name, lambda adapters, tokenizer: judge)


def key_parts(entry: Entry, run_dir: Path) -> dict[str, str | None]:
    """The file that the function stands in."""
    del run_dir
    target = entry.get("function")
    return {f"code of {target}": code_sha256(target)} if isinstance(target, str) else {}
