"""A recipe and its data, checked as the chain would check them, without training anything."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.spec import RowKind
from ..errors import UserError
from ..recipes.build import data_spec, folders, stage_job
from ..recipes.graph import order
from ..recipes.load import load_recipe
from ..recipes.schema import Data, Recipe
from .output import Output
from .process import make_functions_importable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..models.base import Base

_ROW_NAMES = {"demo": "demonstrations", "pair": "pairs", "label": "labelled replies", "prompt": "prompts"}


def validate_recipe(recipe: str, overrides: Sequence[str], output: Output) -> None:
    """`preftune validate`: read all data as each stage would, measure it in tokens, and check every setting.

    What cannot be checked offline is reported, and is not an error.

    Raises:
        UserError: the first thing that is wrong.
    """
    loaded = load_recipe(recipe, overrides)
    make_functions_importable(loaded)
    output.say(f"recipe: {loaded.name}, stages in running order: {', '.join(order(loaded))}")
    base, tokenizer = _base(loaded, output)
    for name, entry, kind in data_uses(loaded):
        for row in _check_rows(loaded, name, entry, kind, base, tokenizer, output):
            if output.json:
                output.rows([row])
    _check_settings(loaded, base, output)
    _check_judges(loaded)
    output.say("nothing wrong found")


def data_uses(recipe: Recipe) -> Iterator[tuple[str, Data, RowKind]]:
    """(name, entry, kind of rows) for each distinct way in which an entry is read."""
    seen = set()
    for name in order(recipe):
        stage = recipe.stages[name]
        use = (stage.data, stage.record.rows)
        if use not in seen:
            seen.add(use)
            yield stage.data, recipe.data[stage.data], stage.record.rows
    if recipe.eval is not None:
        yield "eval.prompts", recipe.eval.prompts, "prompt"


def is_on_hub(recipe: Recipe, path: str) -> bool:
    """Whether a data path can only be a hub dataset, as there is no local file of that name."""
    from ..data.sources import find

    return find(path, folders(recipe)) is None and not Path(path).suffix and path.count("/") <= 1


def offline() -> bool:
    """Whether the user has put the hub's client in offline mode."""
    from huggingface_hub.constants import is_offline_mode

    return is_offline_mode()


def _base(recipe: Recipe, output: Output) -> "tuple[Base | None, PreTrainedTokenizerBase | None]":
    from ..models.loading import resolve_base
    from ..models.tokens import load_tokenizer

    try:
        base = resolve_base(recipe.model.base, recipe.model.revision)
    except UserError as error:
        if "cannot be reached" not in error.problem:
            raise
        output.say(f"model: not checked, {recipe.model.base} is on the hub and cannot be reached; no token lengths")
        return None, None
    output.say(f"model: {recipe.model.base}, sha256 {base.sha256[:12]}")
    return base, load_tokenizer(base, recipe.model.chat_template)


def _check_rows(
    recipe: Recipe,
    name: str,
    entry: Data,
    kind: RowKind,
    base: "Base | None",
    tokenizer: "PreTrainedTokenizerBase | None",
    output: Output,
) -> Iterator[dict[str, Any]]:
    from ..data.encode import encode_rows
    from ..data.load import load_rows

    spec = data_spec(entry, recipe.seed)
    label = f"data {name} as {_ROW_NAMES[kind]}" if name != "eval.prompts" else name
    try:
        loaded = load_rows(spec, kind, folders(recipe))
    except UserError:
        away = [source.path for source in spec.sources if is_on_hub(recipe, source.path)]
        if not (away and offline()):
            raise
        output.say(f"{label}: not checked, {', '.join(away)} is on the hub and we are offline")
        return
    report = {"data": name, "rows": kind, "read": loaded.report.as_dict()}
    _say(output, label, loaded.report.lines())
    if tokenizer is not None:
        rows, encoded = encode_rows(kind, loaded.rows, tokenizer, spec)
        if base is not None:
            from ..stages.run import check_ids

            check_ids(rows, tokenizer, base, f"data.{name}" if name != "eval.prompts" else name)
        _say(output, f"{label}, in tokens", encoded.lines())
        report["encoded"] = encoded.as_dict()
        if not encoded.used:
            why = "; ".join(encoded.lines()[1:])
            raise UserError(f"data.{name}", f"no row is left ({why})", "raise max_length or max_prompt_length")
    yield report


def _check_settings(recipe: Recipe, base: "Base | None", output: Output) -> None:
    from ..models.base import Base
    from ..stages.options import check_words

    stand_in = base or Base(recipe.model.base, Path(), None, "")
    for name in order(recipe):
        check_words(stage_job(recipe, name, stand_in, Path(), Path()))
    output.say(f"stages: every word of {len(recipe.stages)} stages is known")


def _check_judges(recipe: Recipe) -> None:
    if recipe.eval is not None:
        from ..eval.judges.registry import plan_judges

        plan_judges(recipe.eval.judges, Path("runs") / recipe.name)


def _say(output: Output, label: str, lines: list[str]) -> None:
    for line in lines:
        output.say(f"{label}: {line}")
