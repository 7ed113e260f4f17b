"""A server of scores as a judge: `{kind: http, url: ...}` (`stages/scorers/http_scores.py`)."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...models.adapters import AdapterSet
from ...stages.scorers.endpoint_answers import Answers
from ...stages.scorers.http_scores import HttpScorer, read_server
from ...stages.scorers.replies import Failures
from ...stages.scorers.servers import cache_folder
from ..shared import is_first
from .judge import Judge, JudgePlan
from .names import judge_name
from .text_judge import TextJudge


def plan(entry: dict[str, Any], where: str, run_dir: Path | None) -> JudgePlan:
    """Checks the recipe's entry and reads the key; no request is sent.

    Args:
        run_dir: where scores are kept unless the entry names a `cache`; without either they are not kept.

    Raises:
        UserError: a missing or malformed field, or a named variable that is not set.
    """
    server = read_server(entry, where, key_needed=is_first())
    name, folder = judge_name(entry), cache_folder(entry, where, run_dir)

    def open_judge(adapters: AdapterSet, tokenizer: PreTrainedTokenizerBase) -> Judge:
        del adapters
        return TextJudge(name, HttpScorer(server, Answers(folder, where), Failures(where), tokenizer))

    return JudgePlan(name, open_judge)
