"""What a server of rewards is sent, and how its answer is read: our own shape, OpenRLHF's and verl's.

plain:
    POST {"prompts": [...], "completions": [...], "columns": {NAME: [...]}}, as the data have them; the answer is
    {"scores": [...]}.
openrlhf:
    POST {"query": [...], "prompts": [...], "labels": [...]}, all of them text, as its `remote_rm_url` is asked; the
    answer is {"rewards": [...]}.
verl:
    POST {"data_source": ..., "solution_str": ..., "ground_truth": ..., "extra_info": {...}} of one reply, as its
    `compute_score` is called; the answer is a number, or {"score": NUMBER}.

Of several replies a list alone is read too, and `scores` and `rewards` each in place of the other. Imports nothing
heavy.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Asked:
    """One reply as a server may be told of it.

    prompt, completion: as the data have them, text or messages. prompt_text, query: the tokens as text, of the prompt
    and of prompt and reply, special tokens included. reply: the reply's text. columns: of its row. column: the one that
    the recipe names.
    """

    prompt: Any
    completion: Any
    reply: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    column: str | None = None
    prompt_text: str = ""
    query: str = ""

    @property
    def label(self) -> Any:
        """What the named column says; None without one."""
        return None if self.column is None else self.columns.get(self.column)


@dataclass(frozen=True)
class Format:
    """A shape of requests and answers.

    Attributes:
        body: what is posted for some replies.
        scores: the answer's scores, one a reply; None where they cannot be found.
        needs_text: whether it tells the tokens as text.
        single: whether a request is about one reply.
    """

    body: Callable[[Sequence[Asked]], dict[str, Any]]
    scores: Callable[[Any], Any]
    needs_text: bool = False
    single: bool = False


def _plain(asked: Sequence[Asked]) -> dict[str, Any]:
    names = dict.fromkeys(name for each in asked for name in each.columns)
    return {
        "prompts": [each.prompt for each in asked],
        "completions": [each.completion for each in asked],
        "columns": {name: [each.columns.get(name) for each in asked] for name in names},
    }


def _openrlhf(asked: Sequence[Asked]) -> dict[str, Any]:
    return {
        "query": [each.query for each in asked],
        "prompts": [each.prompt_text for each in asked],
        "labels": ["" if each.label is None else each.label for each in asked],
    }


def _verl(asked: Sequence[Asked]) -> dict[str, Any]:
    (each,) = asked
    return {
        "data_source": each.columns.get("data_source", ""),
        "solution_str": each.reply,
        "ground_truth": each.label,
        "extra_info": {name: value for name, value in each.columns.items() if name not in ("data_source", each.column)},
    }


def _several(answer: Any) -> Any:
    if isinstance(answer, dict):
        return next((answer[name] for name in ("scores", "rewards") if name in answer), None)
    return answer


def _rewards(answer: Any) -> Any:
    """OpenRLHF's own server says both: `rewards` is what trains."""
    if isinstance(answer, dict):
        return next((answer[name] for name in ("rewards", "scores") if name in answer), None)
    return answer


def _one(answer: Any) -> Any:
    if isinstance(answer, dict):
        return [answer["score"]] if "score" in answer else None
    return [answer] if not isinstance(answer, list) else None


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "plain": Format(_plain, _several),
        "openrlhf": Format(_openrlhf, _rewards, needs_text=True),
        "verl": Format(_verl, _one, single=True),
    }
)
"""The recipe's word -> the shape."""
