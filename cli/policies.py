"""A run's recipe and its policies: which ones there are, and how to sample from them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, nearest
from ..files import ADAPTER_CONFIG, RECIPE
from ..intact import read_json_object
from ..recipes.build import base_dtype, data_spec, eval_spec, policy_folder, run_folders
from ..recipes.graph import policies
from ..recipes.load import load_recipe
from ..recipes.schema import BASE, Recipe
from .commands import run_folder
from .folder import holds_adapter, no_adapter

if TYPE_CHECKING:
    from ..eval.spec import EvalSpec
    from ..models.base import Base


def run_recipe(run: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the run folder.

    Raises:
        UserError: there is no such folder, or no recipe in it.
    """
    file = run_folder(run) / RECIPE
    if not file.is_file():
        raise UserError(str(run), f"holds no {RECIPE}", "give the folder of a run (runs/NAME)")
    return load_recipe(file, overrides)


def recipe_base(recipe: Recipe) -> "Base":
    """The recipe's base; the recipe's own functions can be imported afterwards."""
    from ..models.loading import resolve_base
    from .process import make_functions_importable

    make_functions_importable(recipe)
    return resolve_base(recipe.base_spec, recipe.model.revision)


def check_policy(recipe: Recipe, run: Path, name: str, where: str) -> None:
    """Raise UserError if the recipe has no such policy, or the run no adapter for it.

    Args:
        where: what asked for it, such as an option; for the message.
    """
    known = [BASE, *policies(recipe)]
    if name not in known:
        raise UserError(where, f"no policy {name!r}", nearest(name, known))
    if name != BASE and not holds_adapter(policy_folder(recipe, run, name)):
        remedy = f"train it: preftune run {run / RECIPE} --until {name}"
        raise UserError(str(run / name), "holds no adapter", remedy)


def finished_policies(recipe: Recipe, run: Path) -> list[str]:
    """The recipe's policies that have an adapter in the run, in their order."""
    return [name for name in policies(recipe) if holds_adapter(run / name)]


def first_reference(recipe: Recipe, run: Path) -> str:
    """What the policies of a recipe without an evaluation are compared with: its first SFT stage, else the base."""
    finished = finished_policies(recipe, run)
    return next((name for name in finished if recipe.stages[name].record.rows == "demo"), BASE)


def last_policy(recipe: Recipe, run: Path) -> str:
    """The last policy that is finished.

    Raises:
        UserError: none is.
    """
    finished = finished_policies(recipe, run)
    if not finished:
        remedy = f"train one: preftune run {run / RECIPE}, or name the base"
        raise UserError(str(run), "no policy is finished in it", remedy)
    return finished[-1]


def sampling_spec(recipe: Recipe, base: "Base", run: Path) -> "EvalSpec":
    """Prompts and settings of fresh samples: the evaluation's, else those of PPO, else the first stage's data."""
    if recipe.eval is not None:
        return eval_spec(recipe, base, run)
    from ..eval.spec import EvalSpec

    sampling = next((stage for stage in recipe.stages.values() if stage.record.on_policy), None)
    stage = sampling or next(iter(recipe.stages.values()))
    method = {} if sampling is None else sampling.method()
    given = {name: method[name] for name in ("max_new_tokens", "temperature") if name in method}
    return EvalSpec(
        base=base,
        policies={},
        reference=BASE,
        prompts=data_spec(recipe.data[stage.data], recipe.seed),
        folders=run_folders(recipe, run),
        dtype=base_dtype(recipe),
        quantization=recipe.model.quantization,
        seed=recipe.seed,
        kl=False,
        chat_template=recipe.model.chat_template,
        template_date=recipe.model.template_date,
        packed=recipe.model.packed,
        **given,
    )


def with_reference(
    spec: "EvalSpec", recipe: Recipe, run: Path, reference: str, asked: Sequence[str] | None = None
) -> "EvalSpec":
    """The same evaluation against another reference: base, a stage of the run, or any adapter's folder on its base.

    Args:
        asked: of these policies alone; None: of all that the evaluation has.

    Raises:
        UserError: there is no such policy, or it was made on another base or with another tokenizer.
    """
    from ..models.lineage import check_parent
    from ..models.tokens import load_tokenizer

    known = [BASE, *policies(recipe)]
    those = {name: folder for name, folder in spec.policies.items() if asked is None or name in asked}
    if reference in known:
        check_policy(recipe, run, reference, "--reference")
        folder = None if reference == BASE else policy_folder(recipe, run, reference)
    else:
        folder = Path(reference).expanduser()
        if not folder.is_dir():
            raise UserError("--reference", f"no policy and no folder {reference!r}", nearest(reference, known))
        tokenizer = load_tokenizer(spec.base, recipe.model.chat_template, recipe.model.template_date)
        if not holds_adapter(folder):
            raise no_adapter(folder, "give a folder that a stage or PEFT's save_pretrained wrote")
        check_parent(folder, spec.base, tokenizer)
        if read_json_object(folder / ADAPTER_CONFIG).get("task_type") == "SEQ_CLS":
            raise UserError(str(folder), "is a reward model, expected a policy", "name a stage that speaks")
    return replace(spec, policies={**those, reference: folder}, reference=reference)


def evaluation_of(
    recipe: Recipe, run: Path, chosen: Sequence[str] | None = None, where: str = "--policies"
) -> "EvalSpec":
    """The recipe's evaluation, of all its policies or of some; where it has none, of all that are finished.

    Raises:
        UserError: a policy in it is unknown or not finished.
    """
    part = recipe.eval
    reference = first_reference(recipe, run) if part is None else part.reference
    listed = [BASE, *finished_policies(recipe, run)] if part is None else list(part.policies)
    names = list(chosen) if chosen else listed
    if reference not in (*names, BASE):
        names.append(reference)
    for name in names:
        check_policy(recipe, run, name, where)
    base = recipe_base(recipe)
    if part is not None:
        return eval_spec(recipe, base, run, names)
    those = {name: None if name == BASE else policy_folder(recipe, run, name) for name in names}
    return replace(sampling_spec(recipe, base, run), policies=those, reference=reference)
