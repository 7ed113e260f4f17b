"""`run` and `train_stage`: the chain in this process, as the command line runs it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ..cli.chain import Chain, Done, Options
from ..cli.folder import holds_adapter, no_adapter
from ..cli.output import Output
from ..errors import UserError, closest, nearest
from ..files import EVALUATION, METRICS
from ..intact import read_json_object
from ..recipes import schema
from .recipe import Recipe, checked_recipe
from .results import EvaluationResult, RunResult, StageResult
from .session import session

_OPTIONS = ("output_dir", "only", "until", "force", "from_adapter", "launch", "num_processes", "quiet", "overrides")


class _Silence(Output):
    """Says nothing."""

    def say(self, line: str) -> None:
        del line


def run(
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    output_dir: str | Path | None = None,
    until: str | None = None,
    force: bool = False,
    launch: str | Path | None = None,
    num_processes: int | None = None,
    quiet: bool = False,
    overrides: Mapping[str, Any] | None = None,
    **more: Any,
) -> RunResult:
    """Run a recipe's whole chain in this process: `preftune run`, with the same folder, numbers and checkpoints.

    What is finished and unchanged is not run again; the same call continues what was interrupted. Ctrl-C stops at the
    next step with a checkpoint and raises KeyboardInterrupt, which says what is kept.

    Args:
        recipe: a `Recipe`, a YAML file, a shipped recipe's name ("smoke"), or a mapping with a recipe's keys.
        output_dir: the run's folder. Default: runs/NAME in the working folder.
        until: that stage and all that it needs; no evaluation.
        force: run even what is unchanged.
        launch, num_processes: each stage in several processes: "ddp", "fsdp2", "zero2", "zero3", or an accelerate
            config's path.
        quiet: say nothing, and show no progress.
        overrides, more: values of the recipe by key: `seed=1`, `lora={"r": 8}`, `**{"stages.dpo.beta": 0.2}`; a mapping
            changes the keys that it has, None removes one.

    Returns:
        The stages with their folders and metrics, and the evaluation.

    Raises:
        UserError: anything wrong with recipe, data or settings, before anything trains.
    """
    values = _overrides(overrides, more)
    with session(quiet):
        checked = checked_recipe(recipe, values)
        config = _engine(launch, num_processes)
        options = Options(_folder(output_dir), None, until, force, None, config)
        return _run(checked, options, quiet)


def train_stage(
    recipe: Recipe | str | Path | Mapping[str, Any],
    stage: str,
    *,
    output_dir: str | Path | None = None,
    from_adapter: str | Path | None = None,
    force: bool = False,
    launch: str | Path | None = None,
    num_processes: int | None = None,
    quiet: bool = False,
    overrides: Mapping[str, Any] | None = None,
    **more: Any,
) -> StageResult:
    """Train one stage alone: `preftune dpo RECIPE`. What it starts from lies in the run's folder, or is `from_adapter`.

    Args:
        stage: its name in the recipe.
        from_adapter: the folder of an adapter to start from in the recipe's parent's place.
        The others are those of `run`.

    Raises:
        UserError: as `run`; and where a stage that it needs is not finished in the folder.
    """
    values = _overrides(overrides, more)
    adapter = None if from_adapter is None else Path(from_adapter).expanduser().resolve()
    if adapter is not None and not holds_adapter(adapter):
        raise no_adapter(adapter, "give a finished stage's folder", "from_adapter")
    with session(quiet):
        checked = checked_recipe(recipe, values)
        if stage not in checked.stages:
            raise UserError(f"train_stage, {stage!r}", "no such stage", nearest(stage, checked.stages))
        options = Options(_folder(output_dir), stage, None, force, adapter, _engine(launch, num_processes))
        return _run(checked, options, quiet)[stage]


def _run(recipe: schema.Recipe, options: Options, quiet: bool) -> RunResult:
    chain = Chain(recipe, options, _Silence() if quiet else Output())
    done = chain.run()
    path = chain.path.resolve()
    stages = tuple(_result(recipe, path, each) for each in done if each.name != EVALUATION)
    evaluated = EvaluationResult.of_run(path) if any(each.name == EVALUATION for each in done) else None
    problems = tuple(f"{each.name}: {each.problem}" for each in done if each.problem)
    return RunResult(path, stages, evaluated, problems)


def _result(recipe: schema.Recipe, path: Path, done: Done) -> StageResult:
    folder = path / done.name
    metrics = read_json_object(folder / METRICS)
    return StageResult(done.name, recipe.stages[done.name].record.name, folder, done.state, done.seconds, metrics)


def _engine(launch: str | Path | None, num_processes: int | None) -> Path | None:
    from ..cli.engines import launch_config

    return launch_config(None if launch is None else str(launch), num_processes)


def _folder(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _overrides(given: Mapping[str, Any] | None, more: Mapping[str, Any]) -> dict[str, Any]:
    """Both together; a keyword that is a slip of an option's name is said as such."""
    for name in more:
        known = {*schema.Recipe.model_fields, *_OPTIONS}
        if "." not in name and name not in known and closest(name, known) in _OPTIONS:
            _unknown(name)
    return {**(given or {}), **more}


def _unknown(name: str) -> NoReturn:
    raise UserError(f"{name}=", "is no argument, and no key of a recipe", nearest(name, _OPTIONS))
