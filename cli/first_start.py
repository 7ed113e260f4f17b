"""What a run takes from its first start and keeps, wherever and whenever it goes on."""

from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ..data.template import writes_date
from ..files import RECIPE
from ..recipes.build import base_dtype
from ..recipes.schema import Precision, Recipe

if TYPE_CHECKING:
    from ..models.base import Base


def fix_date(recipe: Recipe, base: "Base", folder: Path) -> None:
    """Give the run the day that its chat template writes: the day of its first start, so that no row ever changes."""
    model = recipe.model
    if model.template_date is not None or not writes_date(base.path, model.chat_template):
        return
    try:
        model.template_date = date.fromisoformat(str(_before(folder, "template_date")))
    except ValueError:
        model.template_date = _today()


def fix_dtype(recipe: Recipe, folder: Path) -> str:
    """Give the run the precision that `auto` stands for: that of its first start, so that no number ever changes.

    Returns:
        What became of `auto`, in words; empty where the recipe says a precision.
    """
    model = recipe.model
    if model.dtype != "auto":
        return ""
    before = _before(folder, "dtype")
    if before in get_args(Precision):
        model.dtype = before
        return f"model.dtype: auto is {before}, as at this run's first start"
    from ..models.devices import device_name

    model.dtype = base_dtype(recipe)
    return f"model.dtype: auto is {model.dtype} on {device_name()}"


def _before(folder: Path, key: str) -> Any:
    """What the run's own recipe says of the model under that key; None where there is none that can be read."""
    import yaml

    from ..bounded_yaml import load_bounded

    try:
        return load_bounded((folder / RECIPE).read_text(encoding="utf-8"))["model"][key]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None


def _today() -> date:
    return date.today()
