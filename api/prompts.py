"""Prompts and replies as a caller has them, to token ids as the stages make them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.spec import DataSpec, OnProblem, RowKind, SourceSpec
from ..errors import UserError
from .results import Prompt

if TYPE_CHECKING:
    from ..data.rows import Row
    from ..eval.samples import EncodedPrompt
    from ..eval.workbench import Workbench

Prompts = str | Path | Sequence[Prompt]
"""One text, several texts or conversations, or the path (a `Path`) of a data file in any format that a recipe reads."""

STRICT = DataSpec((SourceSpec("prompts"),), max_length=None, overflow="error", on_problem=OnProblem(unusable="error"))
"""Every row that is handed over counts: none is dropped."""


def listed(prompts: Sequence[Prompt] | str, where: str = "prompts") -> list[Prompt]:
    """The prompts one by one; a single text is one.

    Raises:
        UserError: there is none, or one that is neither text nor messages.
    """
    several = [prompts] if isinstance(prompts, str) else list(prompts)
    if several and isinstance(several[0], Mapping):
        said = "is one conversation, expected a list of prompts"
        raise UserError(where, said, "put it into a list: [[{'role': 'user', ...}]]")
    if not several:
        raise UserError(where, "holds none", "give at least one prompt")
    for place, each in enumerate(several):
        if not isinstance(each, str | list | tuple):
            raise UserError(f"{where}[{place}]", f"is a {type(each).__name__}, expected text or messages", "correct it")
    return [each if isinstance(each, str) else list(each) for each in several]


def encode_prompts(bench: "Workbench", prompts: Prompts, max_new_tokens: int) -> "list[EncodedPrompt]":
    """As a recipe's prompts: text is one message of the user's, and the chat template asks for the reply.

    Raises:
        UserError: a prompt that cannot be used, or that leaves the model no room for its reply.
    """
    from ..data.encode import encode_prompts
    from ..data.load import load_rows
    from ..eval.samples import read_prompts
    from ..models.context import check_context

    if isinstance(prompts, Path):
        spec = DataSpec((SourceSpec(str(prompts.expanduser().resolve())),), max_length=None)
        rows = load_rows(spec, "prompt").rows
    else:
        spec = replace(STRICT, system=bench.spec.prompts.system)
        rows = _rows([{"prompt": each} for each in listed(prompts)], "prompt", "prompts")
    dataset, _ = encode_prompts(rows, bench.tokenizer, spec)
    check_context(dataset, bench.spec.base, "prompts", max_new_tokens)
    return read_prompts(dataset)


def encode_as_they_stand(bench: "Workbench", prompts: Sequence[Prompt] | str) -> "list[EncodedPrompt]":
    """Texts without the chat template, to be gone on with; messages with it."""
    from ..eval.samples import EncodedPrompt
    from ..stages.ppo.rollout import Prompts as Plain

    several = listed(prompts)
    plain = Plain.of([{"prompt": each} for each in several], bench.tokenizer)
    turns = [[{"role": "user", "content": each}] if isinstance(each, str) else each for each in several]
    return [EncodedPrompt(messages, ids) for messages, ids in zip(turns, plain.ids, strict=True)]


def encode_replies(bench: "Workbench", prompts: Sequence[Prompt], completions: Sequence[str]) -> list[list[int]]:
    """Ids of each prompt and its reply, EOS included, as a reward stage reads them.

    Raises:
        UserError: not as many replies as prompts, or one that cannot be used (an empty one, say).
    """
    from ..data.encode import encode_labels
    from ..models.context import check_context

    if len(prompts) != len(completions):
        said = f"are {len(completions)}, and the prompts {len(prompts)}"
        raise UserError("completions", said, "give one reply for each prompt")
    pairs = zip(prompts, completions, strict=True)
    rows = _rows([{"prompt": p, "completion": c, "label": True} for p, c in pairs], "label", "completions")
    dataset, _ = encode_labels(rows, bench.tokenizer, STRICT)
    check_context(dataset, bench.spec.base, "completions")
    return [[*row["prompt_ids"], *row["completion_ids"]] for row in dataset]  # pyright: ignore[reportCallIssue, reportArgumentType]: untyped rows


def _rows(raw: Sequence[dict[str, Any]], kind: RowKind, where: str) -> "list[Row]":
    from ..data.formats import normalise
    from ..data.rows import Unusable

    found: list[Row] = []
    for place, each in enumerate(raw):
        origin = f"{where}[{place}]"
        try:
            found += normalise(each, kind, origin)
        except Unusable as unusable:
            raise UserError(origin, f"cannot be used: {unusable}", "correct it, or leave it out") from unusable
    return found
