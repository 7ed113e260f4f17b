"""Where a model lies: from what a caller names to a base, the adapter on it, and how both were used."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli.folder import holds_adapter
from ..cli.policies import check_policy, last_policy, recipe_base, run_recipe
from ..data.spec import DataSpec, SourceSpec
from ..errors import UserError, nearest
from ..files import LINEAGE, RECIPE, ROWS
from ..recipes.build import base_dtype, policy_folder
from ..recipes.graph import reward_models
from ..recipes.schema import BASE, Recipe
from ..stages.kinds import KINDS

if TYPE_CHECKING:
    from ..eval.spec import EvalSpec
    from ..models.base import Base

DTYPES = ("float32", "bfloat16", "float16")
_UNREAD = DataSpec((SourceSpec("nowhere"),))
"""Prompts that nobody reads: they are handed over instead."""


@dataclass(frozen=True)
class Source:
    """A model.

    Attributes:
        name: of the stage, or of the model.
        folder: of its adapter; None: the base itself.
        base: what the adapter lies on.
        settings: the fields of `EvalSpec` that say how it is used: dtype, quantization, chat template, packing.
    """

    name: str
    folder: Path | None
    base: "Base"
    settings: dict[str, Any]

    def spec(self, policies: "dict[str, Path | None] | None" = None) -> "EvalSpec":
        """An evaluation of it alone, or of the given policies on its base."""
        from ..eval.spec import EvalSpec

        mine = {self.name: self.folder} if policies is None else policies
        return EvalSpec(base=self.base, policies=mine, reference=BASE, prompts=_UNREAD, kl=False, **self.settings)


def find_source(path: str | Path, name: str | None = None, *, dtype: str | None = None, reward: bool = False) -> Source:
    """The model that a path names.

    Args:
        path: a run, a stage's folder, any folder with a LoRA adapter of PEFT's, a merged model's, or a base's spec.
        name: which stage of a run; None: the last finished policy (the only reward stage).
        dtype: None: as it was trained, or as it is stored.
        reward: a reward stage is wanted, not a policy.

    Raises:
        UserError: nothing of the kind is there.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError("dtype", f"{dtype!r} is unknown", f"use one of {', '.join(DTYPES)}")
    place = Path(path).expanduser()
    if (place / RECIPE).is_file():
        found = _of_run(place, name, reward)
    elif name is not None:
        raise UserError(str(path), f"is no run, and {name!r} names a stage of one", "leave the name out")
    elif holds_adapter(place):
        found = _of_adapter(place, reward)
    elif reward:
        raise UserError(str(path), "holds no reward stage", "give a finished reward stage's folder, runs/NAME/reward")
    elif (place / ROWS).is_file():
        raise UserError(str(path), "holds rows that were sampled, and no model", "give the stage that they came from")
    else:
        found = _of_model(path)
    return found if dtype is None else replace(found, settings={**found.settings, "dtype": dtype})


def of_recipe(recipe: Recipe) -> dict[str, Any]:
    """How a run's models are used."""
    model = recipe.model
    return {
        "dtype": base_dtype(recipe),
        "quantization": model.quantization,
        "chat_template": model.chat_template,
        "template_date": model.template_date,
        "packed": model.packed,
    }


def one_base(where: str, sources: Sequence[Source]) -> None:
    """All lie on one base, and are used alike: only then do they share it, and can be compared.

    Raises:
        UserError: two differ, and in what.
    """
    first = sources[0]
    for each in sources[1:]:
        if each.base.sha256 != first.base.sha256:
            said = f"{first.name} lies on {first.base.spec}, {each.name} on {each.base.spec}: two models"
            raise UserError(where, said, "compare adapters on one base")
        for key in ("dtype", "quantization"):
            if each.settings.get(key) != first.settings.get(key):
                said = f"{first.name} is used in {first.settings.get(key)}, {each.name} in {each.settings.get(key)}"
                raise UserError(where, said, "give dtype=")


def _of_run(run: Path, name: str | None, reward: bool) -> Source:
    recipe = run_recipe(run)
    if reward:
        name = _reward_stage(recipe, run, name)
        folder = run / name
    else:
        name = name or last_policy(recipe, run)
        check_policy(recipe, run, name, f"load_policy, {str(run)!r}")
        folder = None if name == BASE else policy_folder(recipe, run, name)
    return Source(name, folder, recipe_base(recipe), of_recipe(recipe))


def _reward_stage(recipe: Recipe, run: Path, name: str | None) -> str:
    known = reward_models(recipe)
    if not known:
        raise UserError(str(run), "its recipe has no reward stage", "give the folder of one")
    if name is None and len(known) > 1:
        raise UserError(str(run), f"has {len(known)} reward stages", f"name one of {', '.join(known)}")
    name = name or known[0]
    if name not in known:
        raise UserError(str(run), f"no reward stage {name!r}", nearest(name, known))
    if not holds_adapter(run / name):
        raise UserError(str(run / name), "holds no adapter", f"train it: preftune run {run / RECIPE} --until {name}")
    return name


def _of_adapter(folder: Path, reward: bool) -> Source:
    from ..models.lineage import load_adapter_base, read_lineage

    lineage = read_lineage(folder) if (folder / LINEAGE).is_file() else None
    kind = None if lineage is None or lineage.kind not in KINDS else KINDS[lineage.kind].produces
    if kind == "reward" and not reward:
        raise UserError(str(folder), "is a reward model, which says nothing", "preftune.score reads it")
    if kind == "policy" and reward:
        raise UserError(str(folder), "is a policy, expected a reward stage", "give runs/NAME/reward, say")
    base = load_adapter_base(folder)
    run = folder.resolve().parent
    if (run / RECIPE).is_file() and folder.resolve().name in (recipe := run_recipe(run)).stages:
        return Source(folder.resolve().name, folder, base, of_recipe(recipe))
    from ..models.devices import auto_dtype

    said = {} if lineage is None else lineage.config
    settings = {
        "dtype": said.get("dtype") or auto_dtype(),
        "quantization": said.get("quantization"),
        "chat_template": _template_beside(folder),
    }
    return Source(lineage.stage if lineage else folder.resolve().name, folder, base, settings)


def _template_beside(folder: Path) -> str | None:
    """The chat template of the tokenizer that lies beside an adapter; None where there is none."""
    from ..models.auto import open_tokenizer

    if not (folder / "tokenizer_config.json").is_file():
        return None
    found = open_tokenizer(folder, str(folder)).chat_template
    return found if isinstance(found, str) else None


def _of_model(path: str | Path) -> Source:
    from ..models.auto import open_config
    from ..models.loading import resolve_base

    base = resolve_base(str(path))
    stored = str(open_config(base.path).dtype or "float32").removeprefix("torch.")
    name = Path(str(path)).name or base.spec
    return Source(name, None, base, {"dtype": stored if stored in DTYPES else "float32"})
