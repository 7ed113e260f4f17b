"""`preftune serve`: the command of a server for a stage's policy, or for the rollouts of a recipe; printed, or run."""

import json
import os
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..files import ADAPTER_CONFIG, LINEAGE, RECIPE
from ..intact import check_intact
from ..printed import printable
from ..progress import say
from ..recipes.schema import Recipe
from ..stages.serving.command import (
    BASE_NAME,
    CONTEXT,
    NAMES,
    Engine,
    Serving,
    asked_rank,
    server_command,
    server_environment,
    start_of,
)
from ..stages.serving.process import ServerProcess, check_free, check_program
from ..stopping import Stopped
from .export_model import stage_folder
from .folder import holds_adapter

if TYPE_CHECKING:
    from ..models.base import Base

_WHERE = "preftune serve"
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ServeOptions:
    """What the command line says of the server; None: as the stage or the recipe has it."""

    engine: Engine = "vllm"
    host: str = "127.0.0.1"
    port: int = 8000
    python: Path | None = None
    max_model_len: int | None = None
    dtype: str | None = None


def serve_stage(given: str, stage: str | None, options: ServeOptions, run: bool) -> int:
    """Print the command, or run it until it ends or a signal does.

    Args:
        given: RUN/STAGE, a run or a recipe.
        stage: which of the run's stages is served.

    Returns:
        The exit code.

    Raises:
        UserError: what the server cannot serve, no such program, or a port that is taken.
    """
    if options.dtype is not None and options.dtype not in _DTYPES:
        raise UserError("--dtype", f"{options.dtype!r} is unknown", f"use one of {', '.join(_DTYPES)}")
    serving = _serving(given, stage, options)
    command = server_command(serving, start_of(options.engine, options.python), "--python")
    environment = server_environment(serving)
    if not run:
        print(printable(shlex.join(["env", *(f"{key}={value}" for key, value in environment.items()), *command])))
        return 0
    check_program(command[0], "--python")
    check_free(options.host, options.port, "--port")
    return _run(command, serving, environment)


def _serving(given: str, stage: str | None, options: ServeOptions) -> Serving:
    """What is to be served: a finished stage beside its base; of a run or a recipe, the base for what it will draw."""
    from ..recipes.load import load_recipe

    folder = Path(given)
    place = folder if stage is None else folder / stage
    if holds_adapter(place):
        return _for_stage(place, options)
    if stage is None and (folder / RECIPE).is_file():
        return _for_rollouts(load_recipe(folder / RECIPE), options)
    if (place.parent / RECIPE).is_file() and _draws(recipe := load_recipe(place.parent / RECIPE), place.name):
        return _for_rollouts(recipe, options)
    of_a_run = (folder.parent / RECIPE).is_file() and not folder.is_file()
    if stage is not None or folder.is_dir() or of_a_run:
        return _for_stage(stage_folder(folder, stage), options)
    return _for_rollouts(load_recipe(given), options)


def _draws(recipe: Recipe, name: str) -> bool:
    """Whether that is a stage of the recipe whose replies a server can draw."""
    return name in recipe.stages and recipe.stages[name].record.draws


def _for_stage(folder: Path, options: ServeOptions) -> Serving:
    """A finished stage's policy beside its base.

    Raises:
        UserError: it is a reward model, or no adapter that the server takes; its base has changed.
    """
    from ..models.lineage import load_adapter_base, read_lineage

    check_intact(folder)
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if config.get("task_type") == "SEQ_CLS":
        remedy = "name it as a judge or a reward: preftune scores with it itself"
        raise UserError(str(folder), "is a reward model, and a policy is served", remedy)
    rank = asked_rank(str(folder), config, options.engine)
    base = load_adapter_base(folder)
    trained = read_lineage(folder).config if (folder / LINEAGE).is_file() else {}
    if (bits := trained.get("quantization")) is not None:
        said = f"it was trained beside the base's {bits} copy, and beside the base as it is it says something else"
        say(f"{folder}: {said}; preftune export --to merged has the weights of that copy")
    # an adapter from elsewhere may lie there without a tokenizer
    tokenizer = folder if any(folder.glob("tokenizer*")) else base.path
    return _filled(base, tokenizer, rank, trained.get("dtype"), {folder.resolve().name: folder.resolve()}, options)


def _for_rollouts(recipe: Recipe, options: ServeOptions) -> Serving:
    """The base for a recipe's rollouts: of the largest rank of the policies that speak by a server.

    Raises:
        UserError: one of them is no adapter that the server takes.
    """
    from ..recipes.build import base_dtype
    from .policies import recipe_base

    ranks = [_rank_of(recipe, name, options.engine) for name in _speakers(recipe)]
    base = recipe_base(recipe)
    return _filled(base, base.path, max(ranks, default=8), base_dtype(recipe), {}, options)


def _speakers(recipe: Recipe) -> list[str]:
    """The policies that the recipe has speak by a server; all where it does not say so of any."""
    from ..recipes.graph import policies

    served = {name: each for name, each in recipe.stages.items() if each.method().get("rollout_engine") is not None}
    named = {name if each.record.trains else each.parent for name, each in served.items()}
    if recipe.eval is not None and recipe.eval.rollout is not None:
        named |= set(recipe.eval.policies)
    known = policies(recipe)
    return [name for name in known if name in named] or known


def _rank_of(recipe: Recipe, name: str, engine: Engine) -> int:
    """Of a stage's adapter, as it will be."""
    from ..recipes.build import lora_spec

    spec = lora_spec(recipe, name)
    config = {**vars(spec), "r": spec.rank, "peft_type": "LORA"}
    return asked_rank(f"{recipe.name}: stages.{name}.lora", config, engine)


def _filled(
    base: "Base", tokenizer: Path, rank: int, dtype: str | None, adapters: dict[str, Path], options: ServeOptions
) -> Serving:
    """What the options leave open, as the base and the training have it."""
    import torch

    from ..models.auto import open_config
    from ..models.devices import auto_dtype

    config: Any = open_config(base.path)
    known = getattr(config, "max_position_embeddings", None)
    most = CONTEXT if known is None else min(int(known), CONTEXT)
    return Serving(
        engine=options.engine,
        base=base.path.resolve(),
        tokenizer=tokenizer.resolve(),
        rank=rank,
        dtype=options.dtype or dtype or auto_dtype(),
        max_model_len=options.max_model_len or most,
        host=options.host,
        port=options.port,
        adapters=adapters,
        on_cpu=not torch.cuda.is_available(),
    )


def _run(command: list[str], serving: Serving, environment: dict[str, str]) -> int:
    """Start it, say when it answers, and wait for its end or ours."""
    handle, name = tempfile.mkstemp(prefix=f"preftune-serve-{serving.port}-", suffix=".log")
    os.close(handle)
    say(f"{_WHERE}: {shlex.join(command)}")
    say(f"{_WHERE}: what the server says goes to {name}")
    server = ServerProcess(command, serving.url, Path(name), environment, _WHERE)
    ready = False
    try:
        server.wait_ready()
        ready = True
        names = ", ".join([BASE_NAME, *serving.adapters])
        print(printable(serving.url), flush=True)
        say(f"{_WHERE}: {NAMES[serving.engine]} serves {names}; Ctrl-C ends it")
        code = server.wait()
        say(f"{_WHERE}: the server ended with exit code {code}: {' | '.join(server.last_words())}")
        return int(code != 0)
    except Stopped as stopped:
        # its ordinary end
        return 0 if ready else stopped.exit_code
    finally:
        server.stop()
