"""`preftune eval ...`: the whole evaluation of a run, or one measurement of it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError, nearest
from ..files import RECIPE
from ..progress import say
from .arguments import AsJson, DataOption, EvalOverrides, Policies, RunArgument

if TYPE_CHECKING:
    from ..data.spec import DataSpec, RowKind
    from ..eval.spec import EvalSpec
    from ..recipes.schema import Recipe

app = typer.Typer(help="Measure a run: win-rates, KL, perplexity, reward models.", no_args_is_help=True)


@app.command("run")
def run_all(run: RunArgument, overrides: EvalOverrides = None, json: AsJson = False) -> int:
    """All policies and judges of the recipe, and its reward models; writes RUN/eval and RUN/report.html. Exit code 1 if
    a judge gave no verdict at all."""
    recipe, spec = _open(run, overrides, None)
    from ..eval.report.page import write_report
    from ..eval.report_state import check_replaceable
    from ..eval.run import run_eval
    from ..files import EVALUATION, REPORT
    from .commands import say_self_judged, show_rewards
    from .folder import RunFolder
    from .output import Output

    folder = RunFolder(run)
    with folder.lock(existing=True):
        folder.check_places([EVALUATION])
        check_replaceable(run / REPORT)
        rows = run_eval(spec, run)
        write_report(run)
    _print(rows, json)
    say_self_judged(recipe, rows, run, Output(json))
    if not json:
        show_rewards(run, Output())
    return _say_silence(rows)


@app.command()
def winrate(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run folder.")] = None,
    overrides: EvalOverrides = None,
    policies: Policies = None,
    annotations: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH...",
            help="Score preferences that exist already, as AlpacaEval, Chatbot Arena, Arena-Hard, MT-bench write them.",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of --annotations: the model that the others are compared with."),
    ] = None,
    votes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Count people's votes (`preftune chat --compare`): no model needed."),
    ] = None,
    json: AsJson = False,
) -> int:
    """Win-rates against the reference, with intervals; or from --annotations PATH..., fitted jointly, or from --votes.

    A row of annotations may also be {"prompt": id, "baseline_length": int, "model_length": int, "preference": 1..2},
    where 2 says that the model wins.
    """
    if baseline is not None and not annotations:
        raise UserError("--baseline", "means nothing without --annotations", "leave it out; a run has eval.reference")
    if votes is not None:
        if policies or annotations or run is not None:
            raise UserError("--votes", "stands alone", "leave out the run, --policies and --annotations")
        from ..eval.chat.votes import read_votes, vote_rows
        from .output import Output

        Output(json).rows(vote_rows(read_votes(votes)))
        return 0
    if annotations:
        if policies:
            raise UserError("--policies", "means nothing with --annotations", "leave it out")
        from ..eval.annotations import annotation_rows

        # An option takes one value: the paths after the first stand where a run and its overrides would.
        paths = [*annotations, *([run] if run else []), *map(Path, overrides or ())]
        _print(annotation_rows(paths, baseline=baseline), json)
        return 0
    if run is None:
        raise UserError("eval winrate", "neither a run folder nor --annotations nor --votes", "give one of them")
    recipe, spec = _open(run, overrides, policies)
    from ..eval.commands import eval_winrate
    from .commands import say_self_judged
    from .output import Output

    rows = eval_winrate(spec, run)
    _print(rows, json)
    say_self_judged(recipe, rows, run, Output(json))
    return _say_silence(rows)


@app.command()
def kl(
    run: RunArgument,
    overrides: EvalOverrides = None,
    policies: Policies = None,
    data: DataOption = None,
    reference: Annotated[
        str | None,
        typer.Option(help="base, a stage of the run, or an adapter's folder, also of another run on the same base."),
    ] = None,
    json: AsJson = False,
) -> None:
    """KL(policy || reference) in nats, with standard errors, on replies to the evaluation's prompts or those of --data.

    RUN may be RUN/STAGE: that policy alone. Without an evaluation in the recipe the reference is its first SFT stage,
    else the base.
    """
    run, policies = _stage_of(run, policies)
    recipe, spec = _open(run, overrides, policies, without_eval=data is not None)
    from ..eval.commands import eval_kl
    from ..recipes.expansion import members
    from .policies import with_reference

    if data is not None:
        spec = replace(spec, prompts=_data(recipe, data, "prompt"))
    if reference is not None:
        asked = members(recipe.expanded, policies.split(",")) if policies else None
        spec = with_reference(spec, recipe, run, reference, asked)
    rows = eval_kl(spec)
    # its KL to itself says nothing, unless nothing else was asked for
    _print([row for row in rows if row["policy"] != reference or len(rows) == 1], json)


def _stage_of(run: Path, policies: str | None) -> tuple[Path, str | None]:
    """(the run, its policies): a stage's folder is that policy of the run that it lies in."""
    from ..files import ADAPTER_CONFIG

    here = run.expanduser()
    if not (here / ADAPTER_CONFIG).is_file():
        return run, policies
    if policies:
        raise UserError("--policies", f"stands beside {run}, which is one policy", "leave one of them out")
    if not (here.absolute().parent / RECIPE).is_file():
        remedy = "give RUN/STAGE, and the other one with --reference"
        raise UserError(str(run), f"is an adapter outside a run: its folder's has no {RECIPE}", remedy)
    return here.absolute().parent, here.absolute().name


@app.command()
def perplexity(
    run: RunArgument,
    overrides: EvalOverrides = None,
    policies: Policies = None,
    data: DataOption = None,
    json: AsJson = False,
) -> None:
    """Perplexity of demonstrations under every policy. Default data: those of the SFT stage."""
    recipe, spec = _open(run, overrides, policies, without_eval=True)
    from ..eval.commands import eval_perplexity

    _print(eval_perplexity(spec, _data(recipe, data, "demo")), json)


@app.command()
def reward(
    run: RunArgument,
    overrides: EvalOverrides = None,
    stage: Annotated[
        str | None, typer.Option(help="One reward stage, or one DPO, IPO or KTO stage. Default: all that are finished.")
    ] = None,
    data: DataOption = None,
    json: AsJson = False,
) -> None:
    """Accuracy, log loss and calibration of reward models, and of the implicit rewards of DPO, IPO and KTO policies.

    Default data: each stage's own, the part that its training left out where there is one.
    """
    recipe = _recipe(run, overrides, without_eval=True)
    from ..recipes.build import reward_model, reward_stages
    from .folder import holds_adapter
    from .policies import recipe_base, sampling_spec

    known = reward_stages(recipe)
    if not known:
        raise UserError(recipe.name, "has no reward, DPO or KTO stage", "add one to the recipe")
    if stage is not None and stage not in known:
        raise UserError(f"--stage {stage}", "no reward, DPO or KTO stage of that name", nearest(stage, known))
    named = [stage] if stage is not None else [each for each in known if holds_adapter(run / each)]
    if not named:
        raise UserError(str(run), f"none of {', '.join(known)} is finished in it", "train one of them first")
    given = None if data is None else _data(recipe, data, "pair")
    from ..eval.commands import eval_reward

    models = [reward_model(recipe, each, run, given) for each in named]
    _print(eval_reward(sampling_spec(recipe, recipe_base(recipe), run), models, skip=stage is None), json)


@app.command("over-optimisation")
def over_optimisation(
    run: RunArgument,
    overrides: EvalOverrides = None,
    gold: Annotated[str | None, typer.Option(help="The judge to believe. Default: the recipe's.")] = None,
    proxy: Annotated[
        str | None, typer.Option(help="The judge optimised for. Default: that of the reward stage PPO trains on.")
    ] = None,
    best_of: Annotated[int | None, typer.Option(help="Replies a prompt. Default: the recipe's, or 16.")] = None,
    prompts: Annotated[int | None, typer.Option(help="At most so many. Default: the recipe's, or 50.")] = None,
    json: AsJson = False,
) -> None:
    """Proxy and gold reward against sqrt(KL), through PPO's kept policies and with best of n; writes nothing.

    PPO keeps a policy every N iterations with keep_every: N in its stage.
    """
    recipe = _recipe(run, overrides)
    assert recipe.eval is not None
    from ..eval.judges.names import scoring_judges
    from ..recipes.build import eval_spec
    from ..recipes.over_optimisation import settle_over_optimisation
    from ..recipes.schema import OverOptimisation

    given = {"gold": gold, "proxy": proxy, "best_of": best_of, "prompts": prompts}
    said = {} if recipe.eval.over_optimisation is None else recipe.eval.over_optimisation.model_dump()
    values = said | {key: value for key, value in given.items() if value is not None}
    for option, value, least in (("--best-of", best_of, 2), ("--prompts", prompts, 1)):
        if value is not None and value < least:
            raise UserError(option, f"is {value}, expected {least} or more", "raise it")
    if "gold" not in values:
        known = ", ".join(scoring_judges(recipe.eval.judges)) or "none in eval.judges"
        raise UserError("--gold", "not given, and the recipe names no gold judge", f"name a judge that scores: {known}")
    recipe.eval.over_optimisation = OverOptimisation(**values)
    settle_over_optimisation(recipe)
    from ..eval.overoptimisation import eval_over_optimisation
    from .commands import show_over_optimisation
    from .policies import recipe_base

    show_over_optimisation(eval_over_optimisation(eval_spec(recipe, recipe_base(recipe), run), run), json)


@app.command()
def alpaca(
    run: RunArgument,
    overrides: EvalOverrides = None,
    policies: Policies = None,
    data: DataOption = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="A new folder for the outputs. Default: RUN/alpaca.", show_default=False)
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Score what an annotator said of the outputs, instead of writing them."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Replies as AlpacaEval reads them, a file a policy; with --annotations the win-rates that came of them.

    Instructions: the evaluation's prompts, or --data (alpaca_eval.json as it is). With --annotations the baseline is
    the evaluation's reference where it is among the generators, else the one that the rows agree on.
    """
    recipe, spec = _open(run, overrides, policies, without_eval=data is not None or annotations is not None)
    if annotations is not None:
        if data is not None or output_dir is not None or policies is not None:
            raise UserError("--annotations", "is read, and nothing is written", "leave the other options out")
        from ..eval.annotations import annotation_rows, generators

        ours = f"{recipe.name}-{spec.reference}"
        baseline = ours if ours in generators(annotations) else None
        _print(annotation_rows([annotations], baseline=baseline), json)
        return
    from ..eval.alpaca import alpaca_outputs, write_outputs
    from .merge import check_new
    from .output import Output

    folder = output_dir or run / "alpaca"
    check_new(folder)
    asked = spec if data is None else replace(spec, prompts=_data(recipe, data, "prompt"))
    outputs = alpaca_outputs(replace(asked, kl=False), recipe.name)
    files = dict(zip(outputs, write_outputs(folder, outputs), strict=True))
    rows = [{"policy": name, "n": len(rows), "file": str(files[name])} for name, rows in outputs.items()]
    Output(json).rows(rows)


@app.command()
def benchmarks(
    run: RunArgument,
    overrides: EvalOverrides = None,
    policies: Policies = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B", help="lm-eval's names, or YAML files. Default: the recipe's.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Documents of each task. Default: the recipe's, or all.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question. Default: the recipe's, or the task's.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder of further tasks; the Python in it runs.")
    ] = None,
    apply_chat_template: Annotated[
        bool | None, typer.Option("--apply-chat-template/--no-chat-template", help="Ask as in a chat. Default: no.")
    ] = None,
    json: AsJson = False,
) -> None:
    """lm-eval's tasks for every policy and the base, with what each gained or lost; writes RUN/eval/benchmarks.json.

    It needs the extra lm-eval. Tasks of lm-eval's own fetch their data from the hub.
    """
    recipe, spec = _open(run, overrides, policies, without_eval=True)
    from ..recipes.build import benchmarks as described
    from ..recipes.schema import Benchmarks
    from .benchmarks import measure, show_benchmarks

    part = recipe.eval.benchmarks if recipe.eval is not None else None
    given = {
        **{"limit": limit, "num_fewshot": num_fewshot, "apply_chat_template": apply_chat_template},
        "tasks": [each.strip() for each in tasks.split(",") if each.strip()] if tasks is not None else None,
        "include_path": None if include_path is None else str(include_path.resolve()),
    }
    values = ({} if part is None else part.model_dump()) | {
        key: each for key, each in given.items() if each is not None
    }
    if not values.get("tasks"):
        raise UserError(
            "--tasks", "not given, and the recipe has no eval.benchmarks", "name some, as --tasks arc_easy,piqa"
        )
    show_benchmarks(measure(replace(spec, benchmarks=described(Benchmarks(**values))), run), json)


def _recipe(run: Path, overrides: list[str] | None, *, without_eval: bool = False) -> "Recipe":
    """The run's recipe.

    Raises:
        UserError: it has no evaluation, and that is needed.
    """
    from .policies import run_recipe

    recipe = run_recipe(run, overrides or ())
    if recipe.eval is None and not without_eval:
        remedy = "add eval: {prompts: ..., judges: [...]}; eval kl, perplexity and reward need only --data"
        raise UserError(str(run / RECIPE), "its recipe has no evaluation", remedy)
    return recipe


def _open(
    run: Path, overrides: list[str] | None, policies: str | None, *, without_eval: bool = False
) -> "tuple[Recipe, EvalSpec]":
    """The run's recipe and its evaluation; where it has none and may have none, all its finished policies.

    Raises:
        UserError: a policy in it is unknown or not finished.
    """
    recipe = _recipe(run, overrides, without_eval=without_eval)
    from ..recipes.expansion import members
    from .policies import evaluation_of

    named = [name.strip() for name in policies.split(",")] if policies else None
    chosen = members(recipe.expanded, named) if named is not None else None
    return recipe, evaluation_of(recipe, run, chosen)


def _data(recipe: "Recipe", given: str | None, rows: "RowKind") -> "DataSpec":
    """The data entry or file of that name; where none is given, that of the first stage that reads such rows."""
    from ..recipes.build import data_spec
    from ..recipes.schema import Data

    if given is None:
        first = next((stage.data for stage in recipe.stages.values() if stage.record.rows == rows), None)
        if first is None:
            said = f"none given, and no stage of the recipe reads rows of kind {rows}"
            raise UserError("--data", said, "name a data entry or a file")
        given = first
    if given in recipe.data:
        return data_spec(recipe.data[given], recipe.seed)
    here = Path(given).expanduser()
    return data_spec(Data(path=str(here.resolve()) if here.exists() else given), recipe.seed)


def _say_silence(rows: Sequence[Mapping[str, Any]]) -> int:
    """Say on standard error which judges gave no verdict at all; the exit code."""
    from ..eval.results import silence_words

    words = silence_words(rows)
    for line in words:
        say(line)
    return int(bool(words))


def _print(rows: Sequence[Mapping[str, Any]], json: bool) -> None:
    """Print the rows. As tables, the measurements of replies and the matrix of all pairs stand apart from the rest."""
    from .output import Output

    output = Output(json)
    if json:
        output.rows(rows)
        return
    judged = any("judge" in row for row in rows)
    from ..eval.replies import REPLY_COLUMNS, REPLY_LEGEND

    apart = {"against", "calibration", "usage", *(REPLY_COLUMNS if judged else ())}
    output.rows({key: value for key, value in row.items() if key not in apart} for row in rows)
    if judged:
        output.say(f"\nreplies: {REPLY_LEGEND}")
        first = {row["policy"]: row for row in reversed(rows)}
        policies = dict.fromkeys(row["policy"] for row in rows)
        output.rows({key: first[policy].get(key) for key in ("policy", *REPLY_COLUMNS)} for policy in policies)
    matrix = [row for row in rows if row.get("against")]
    if len(matrix) > 2:
        output.say("\nwin-rate of the row's policy against the column's")
        others = list(dict.fromkeys(row["policy"] for row in matrix))
        output.rows(
            {key: row[key] for key in ("policy", "judge")}
            | {other: row["against"].get(other, {}).get("win_rate") for other in others}
            for row in matrix
        )
