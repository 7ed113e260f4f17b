"""`preftune eval ...`: the whole evaluation of a run, or one measurement of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data.errors import UserError

if TYPE_CHECKING:
    from ..data.spec import DataSpec
    from ..eval.spec import EvalSpec
    from ..recipes.schema import Recipe

app = typer.Typer(help="Measure a run: win-rates, KL, perplexity, reward models.", no_args_is_help=True)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides such as eval.temperature=0.")
]
Policies = Annotated[str | None, typer.Option(metavar="A,B", help="These policies only. Default: the recipe's.")]
DataOption = Annotated[str | None, typer.Option("--data", help="A data entry of the recipe, or a file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Results as one JSON object a line.")]


@app.command("run")
def run_all(run: Run, overrides: Overrides = None, json: AsJson = False) -> None:
    """All policies and judges of the recipe; writes RUN/eval and RUN/report.html."""
    _, spec = _open(run, overrides, None)
    from ..eval.report import write_report
    from ..eval.run import run_eval
    from .folder import RunFolder

    folder = RunFolder(run)
    with folder.lock():
        rows = run_eval(spec, run)
        write_report(run)
    _print(rows, json)


@app.command()
def winrate(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run folder.")] = None,
    overrides: Overrides = None,
    policies: Policies = None,
    annotations: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH...", help="Score preferences that exist already: JSONL, one file a model."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Win-rates against the reference, with intervals; or those of --annotations PATH..., fitted jointly.

    A row of annotations: {"prompt": id, "baseline_length": int, "model_length": int, "preference": 1..2}, where 2 says
    that the model wins.
    """
    if annotations:
        if policies:
            raise UserError("--policies", "means nothing with --annotations", "leave it out")
        from ..eval.annotations import annotation_rows

        # An option takes one value: the paths after the first stand where a run and its overrides would.
        _print(annotation_rows([*annotations, *([run] if run else []), *map(Path, overrides or ())]), json)
        return
    if run is None:
        raise UserError("eval winrate", "neither a run folder nor --annotations", "give one of them")
    _, spec = _open(run, overrides, policies)
    from ..eval.commands import eval_winrate

    _print(eval_winrate(spec, run), json)


@app.command()
def kl(run: Run, overrides: Overrides = None, policies: Policies = None, json: AsJson = False) -> None:
    """KL(policy || reference) in nats, with standard errors."""
    _, spec = _open(run, overrides, policies)
    from ..eval.commands import eval_kl

    _print(eval_kl(spec), json)


@app.command()
def perplexity(
    run: Run, overrides: Overrides = None, policies: Policies = None, data: DataOption = None, json: AsJson = False
) -> None:
    """Perplexity of demonstrations under every policy. Default data: those of the SFT stage."""
    recipe, spec = _open(run, overrides, policies)
    from ..eval.commands import eval_perplexity

    _print(eval_perplexity(spec, _data(recipe, data, "sft")), json)


@app.command()
def reward(
    run: Run,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="One reward stage. Default: all.")] = None,
    data: DataOption = None,
    json: AsJson = False,
) -> None:
    """Accuracy, log loss and calibration of reward models on pairs. Default data: those of the reward stage."""
    recipe, spec = _open(run, overrides, None)
    from ..eval.commands import eval_reward
    from .commands import the_stage

    named = [each for each, made in recipe.stages.items() if made.kind == "reward"]
    if stage is not None or not named:
        named = [the_stage(recipe, "reward", stage)]
    _print(eval_reward(spec, {each: run / each for each in named}, _data(recipe, data, "reward")), json)


def _open(run: Path, overrides: list[str] | None, policies: str | None) -> "tuple[Recipe, EvalSpec]":
    """The run's recipe and its evaluation."""
    from ..recipes.build import eval_spec
    from ..recipes.load import load_recipe
    from ..recipes.problems import nearest
    from ..recipes.schema import BASE
    from .chain import import_from_here
    from .commands import run_folder

    file = run_folder(run) / "recipe.yaml"
    if not file.is_file():
        raise UserError(str(run), "holds no recipe.yaml", "give the folder of a run (runs/NAME)")
    recipe = load_recipe(file, overrides or ())
    if recipe.eval is None:
        raise UserError(str(file), "its recipe has no evaluation", "add eval: {prompts: ..., judges: [...]}")
    chosen = [name.strip() for name in policies.split(",")] if policies else list(recipe.eval.policies)
    if recipe.eval.reference not in (*chosen, BASE):
        chosen.append(recipe.eval.reference)
    known = [BASE, *(name for name, stage in recipe.stages.items() if stage.kind != "reward")]
    for name in chosen:
        if name not in known:
            raise UserError("--policies", f"no policy {name!r}", nearest(name, known))
        if name != BASE and not (run / name / "adapter_config.json").is_file():
            raise UserError(str(run / name), "holds no adapter", f"train it: preftune run {file} --until {name}")
    import_from_here(recipe)
    from ..models.base import resolve_base

    base = resolve_base(recipe.model.base, recipe.model.revision)
    return recipe, eval_spec(recipe, base, run, chosen)


def _data(recipe: "Recipe", given: str | None, kind: str) -> "DataSpec":
    """The data entry or file of that name; the first such stage's where none is named."""
    from ..recipes.build import data_spec
    from ..recipes.schema import Data

    if given is None:
        first = next((stage.data for stage in recipe.stages.values() if stage.kind == kind), None)
        if first is None:
            raise UserError("--data", f"none given, and the recipe has no {kind} stage", "name a data entry or a file")
        given = first
    if given in recipe.data:
        return data_spec(recipe.data[given], recipe.seed)
    here = Path(given).expanduser()
    return data_spec(Data(path=str(here.resolve()) if here.exists() else given), recipe.seed)


def _print(rows: list[dict[str, Any]], json: bool) -> None:
    """The rows; as tables, the matrix of all pairs stands apart from the rest."""
    from .progress import Voice

    voice = Voice(json)
    if json:
        voice.rows(rows)
        return
    voice.rows({key: value for key, value in row.items() if key != "against"} for row in rows)
    matrix = [row for row in rows if row.get("against")]
    if len(matrix) > 2:
        voice.say("\nwin-rate of the row's policy against the column's")
        others = list(dict.fromkeys(row["policy"] for row in matrix))
        voice.rows(
            {key: row[key] for key in ("policy", "judge")}
            | {other: row["against"].get(other, {}).get("win_rate") for other in others}
            for row in matrix
        )
