"""AlpacaEval's files: what every policy replies, for its annotators."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import whole_folder
from .samples import EncodedPrompt, Sample
from .spec import EvalSpec
from .workbench import Workbench


def alpaca_outputs(spec: EvalSpec, name: str) -> dict[str, list[dict[str, Any]]]:
    """Policy -> its rows as AlpacaEval's `model_outputs.json` has them: instruction, output, generator, dataset.

    Args:
        spec: its prompts are the instructions; replies that the run's evaluation drew to the same ones are used again.
        name: of the run; the generator is called NAME-POLICY.

    Raises:
        UserError: a prompt is more than one turn of a user, which has no place in that format.
    """
    bench = Workbench.open(spec)
    prompts = bench.prompts()
    asked = _instructions(prompts)
    return {policy: _rows(bench.samples(policy, prompts), asked, f"{name}-{policy}", name) for policy in bench.roles}


def write_outputs(folder: Path, outputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Path]:
    """A file for each policy, `POLICY.json`; the folder appears whole or not at all."""
    with whole_folder(folder) as made:
        for policy, rows in outputs.items():
            text = json.dumps(list(rows), indent=2, ensure_ascii=False) + "\n"
            # a lone surrogate in a reply has no UTF-8
            (made / f"{policy}.json").write_bytes(text.encode("utf-8", "replace"))
    return [folder / f"{policy}.json" for policy in outputs]


def _instructions(prompts: Sequence[EncodedPrompt]) -> list[str]:
    longer = [place for place, prompt in enumerate(prompts) if not _is_single(prompt)]
    if longer:
        said = (
            f"{len(longer)} of {len(prompts)} prompts are not one turn of a user in words (the first: {longer[0] + 1})"
        )
        raise UserError("eval alpaca", f"{said}, which AlpacaEval's format cannot hold", "give others with --data")
    return [prompt.messages[0]["content"] for prompt in prompts]


def _is_single(prompt: EncodedPrompt) -> bool:
    first = prompt.messages[0]
    return len(prompt.messages) == 1 and first["role"] == "user" and isinstance(first["content"], str)


def _rows(replies: Sequence[Sample], asked: Sequence[str], generator: str, name: str) -> list[dict[str, Any]]:
    return [
        {
            "instruction": instruction,
            "output": reply.completion,
            "generator": generator,
            # AlpacaEval's own questions say which set they are of
            "dataset": str(reply.prompt.columns.get("dataset", name)),
        }
        for reply, instruction in zip(replies, asked, strict=True)
    ]
