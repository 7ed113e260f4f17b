"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a shipped recipe's name.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]

RecipeOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Overrides such as stages.dpo.beta=0.2; behind --, options of accelerate launch.",
    ),
]
EvalOverrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides such as eval.temperature=0.")
]

AsJson = Annotated[bool, typer.Option("--json", help="Results as one JSON object a line.")]
OutputDir = Annotated[Path | None, typer.Option(help="The run folder. Default: runs/NAME.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Run even what is unchanged.")]
Launch = Annotated[
    str | None,
    typer.Option(
        metavar="ENGINE", help="ddp, fsdp2, zero2, zero3, or an accelerate config: each stage in several processes."
    ),
]
Processes = Annotated[
    int | None, typer.Option("--num-processes", min=1, metavar="N", help="With --launch ddp, fsdp2, zero2, zero3.")
]
Policies = Annotated[str | None, typer.Option(metavar="A,B", help="These policies only. Default: the recipe's.")]
DataOption = Annotated[str | None, typer.Option("--data", help="A data entry of the recipe, or a file.")]

ExportTarget = Literal["merged", "gguf", "ollama", "vllm", "verl"]
"""What `preftune export` writes: a policy as one model, for llama.cpp, Ollama, vLLM; a PPO stage for verl to train."""

EngineName = Literal["vllm", "sglang"]
"""Whose server `preftune serve` starts."""


def apart(overrides: list[str] | None) -> tuple[list[str], list[str]]:
    """(the overrides, the options for accelerate's launcher, which stand behind `--`)."""
    words = overrides or []
    # no key begins with a dash, and before `--` no option is taken for an override
    first = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:first], words[first:]
