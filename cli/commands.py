"""What the commands do beyond parsing their arguments."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest
from ..files import EVALUATION, REPORT, RESULTS, REWARDS
from ..intact import read_json
from ..progress import duration
from ..recipes.load import load_recipe, shipped_recipes
from ..recipes.schema import Recipe
from ..version import __version__
from .chain import Chain, Done, Options
from .folder import holds_adapter, no_adapter
from .output import Output


def run_chain(recipe: str, overrides: Sequence[str] | None, options: Options, json: bool) -> list[Done]:
    """`preftune run`: run the chain, then say where the results are."""
    _greet(recipe, json)
    loaded = load_recipe(recipe, overrides or ())
    return _run(loaded, options, Output(json))


def run_alone(
    kind: str,
    recipe: str,
    overrides: Sequence[str] | None,
    stage: str | None,
    output_dir: Path | None,
    from_adapter: Path | None,
    force: bool,
    launch: Path | None,
    json: bool,
) -> list[Done]:
    """`preftune dpo` and the like: run one stage on what is in the run folder."""
    _greet(recipe, json)
    loaded = load_recipe(recipe, overrides or ())
    if from_adapter is not None and not holds_adapter(from_adapter):
        raise no_adapter(from_adapter, "give a finished stage's folder", "--from-adapter")
    adapter = from_adapter.resolve() if from_adapter is not None else None
    options = Options(output_dir, the_stage(loaded, kind, stage), None, force, adapter, launch)
    return _run(loaded, options, Output(json))


def the_stage(recipe: Recipe, kind: str, name: str | None) -> str:
    """The recipe's stage of that kind: the named one, the only one, or the one named after its kind."""
    those = [each for each, stage in recipe.stages.items() if stage.record.name == kind]
    if name is not None:
        if name not in those:
            raise UserError(
                f"--stage {name}",
                f"no {kind} stage of that name",
                nearest(name, those) if those else "add it to the recipe",
            )
        return name
    if not those:
        raise UserError(recipe.name, f"has no stage of kind {kind}", "add one to the recipe")
    if len(those) > 1 and kind not in those:
        raise UserError(recipe.name, f"has several stages of kind {kind}", f"add --stage, one of {', '.join(those)}")
    return kind if kind in those else those[0]


def run_folder(path: Path) -> Path:
    """The same path, which must be an existing folder.

    Raises:
        UserError: it is not.
    """
    if not path.is_dir():
        raise UserError(str(path), "no such folder", "give the folder of a run (runs/NAME)")
    return path


def list_recipes(json: bool) -> None:
    """`preftune recipes`: the shipped recipes' names, and the first line of each file's comment."""
    rows = []
    for file in shipped_recipes():
        first = file.read_text(encoding="utf-8").splitlines()[0]
        about = first.removeprefix("#").strip() if first.startswith("#") else ""
        rows.append({"name": file.stem, "about": about, **({"path": str(file)} if json else {})})
    Output(json).rows(rows)


def _greet(recipe: str, json: bool) -> None:
    """On the screen at once: what comes next, torch above all, takes seconds to load."""
    Output(json, log=True).say(f"preftune {__version__}: reading {recipe}")


def _run(recipe: Recipe, options: Options, output: Output) -> list[Done]:
    chain = Chain(recipe, options, Output(output.json, log=True))
    done = chain.run()
    if output.json:
        output.rows({"stage": each.name, "state": each.state, "seconds": each.seconds, **each.metrics} for each in done)
    else:
        _show_results(recipe, chain.path, done, output)
    spent = sum(each.seconds for each in done if each.state == "ran")
    output.say(f"adapters: {chain.path}/<stage>, report: {chain.path / REPORT} ({duration(spent)} of work)")
    return done


def show_rewards(path: Path, output: Output) -> None:
    """Print the table of RUN/eval/rewards.json, if the evaluation wrote one."""
    file = path / EVALUATION / REWARDS
    if rows := read_rows(file):
        output.say("\nreward models on the pairs that training left out; held against longer_wins")
        columns = (
            "stage",
            "kind",
            "n",
            "accuracy",
            "ci_low",
            "ci_high",
            "log_loss",
            "calibration_error",
            "longer_wins",
        )
        output.rows({key: row.get(key) for key in columns} for row in rows)


def read_rows(file: Path) -> list[Mapping[str, Any]]:
    """The rows of a JSON file that holds a list of objects; none where there is no file.

    Raises:
        UserError: it cannot be read.
    """
    found = read_json(file)
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def show_over_optimisation(content: Mapping[str, Any], json: bool) -> None:
    """Print the points and the fits of `eval.overoptimisation`: two tables, or JSON lines of both."""
    output = Output(json)
    proxy, gold = content["proxy"], content["gold"]
    points, fits = [], []
    for method in content["methods"]:
        for point in method["points"]:
            near = {"sqrt_kl": max(point["kl"], 0.0) ** 0.5}
            keys = ("label", "kl", "kl_se", "sqrt_kl", "proxy", "proxy_se", "gold", "gold_se")
            points.append({"method": method["method"]} | {key: (point | near)[key] for key in keys})
        for side in ("proxy", "gold"):
            if method["fit"] is not None and (fit := method["fit"][side]) is not None:
                fits.append({"method": method["method"], "side": side, "form": method["fit"]["form"], **fit})
    output.rows(points)
    if not json:
        output.say(
            f"\nproxy {proxy}, gold {gold}, {content['prompts']} prompts, from {content['start']}; KL per reply "
            "in nats, that of best of n an upper bound\n"
        )
        output.say("gain over the start as a function of d = sqrt(KL); peak: its highest d within the measured range")
        if not fits:
            output.say("nothing fitted: fewer than 3 points off zero (keep_every of the PPO stage keeps more)")
    output.rows(fits)
    for method in content["methods"] if fits else ():
        output.say(f"{method['method']}, {method['peak']}")


def say_self_judged(recipe: Recipe, rows: Sequence[Mapping[str, Any]], run_dir: Path, output: Output) -> None:
    """Say which judges of these results are no strangers to what they judge."""
    from ..eval.judges.self_preference import self_judged

    judges = {row.get("judge") for row in rows}
    for judge, said in self_judged(recipe.resolved(), {str(row.get("policy")) for row in rows}, run_dir).items():
        if judge in judges:
            output.say(said)


def _show_results(recipe: Recipe, path: Path, done: Sequence[Done], output: Output) -> None:
    """Print the evaluation's tables, if this run had an evaluation."""
    results = read_rows(path / EVALUATION / RESULTS)
    if results and any(each.name == EVALUATION for each in done):
        columns = (
            *("policy", "reference", "judge", "n", "mean_score", "win_rate", "ci_low", "ci_high"),
            *("length", "repetition", "kl"),
        )
        output.rows({key: row.get(key) for key in columns} for row in results)
        say_self_judged(recipe, results, path, output)
        show_rewards(path, output)
