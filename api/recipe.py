"""A recipe as Python sees it: checked when it is made, and never changed afterwards."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..recipes import schema
from ..recipes.graph import order
from ..recipes.load import load_recipe, recipe_of


class Recipe:
    """A whole chain, checked. Make one with `from_yaml` or `from_dict`; it never changes.

    >>> recipe = Recipe.from_yaml("smoke", {"stages.dpo.beta": 0.2})
    >>> recipe.stages
    {'sft': 'sft', 'reward': 'reward', 'dpo': 'dpo', 'ipo': 'dpo', 'kto': 'kto', 'ppo': 'ppo'}
    """

    __slots__ = ("_checked",)

    def __init__(self, checked: schema.Recipe) -> None:
        self._checked = checked

    @classmethod
    def from_yaml(cls, path_or_name: str | Path, overrides: Mapping[str, Any] | None = None) -> "Recipe":
        """From a YAML file, or a shipped recipe by its name (`preftune recipes` lists them).

        Args:
            overrides: values by key, with dots, {"stages.dpo.beta": 0.2}, or nested, {"lora": {"r": 8, "alpha": 16}}:
                a mapping changes the keys that it has, and None removes a key.

        Raises:
            UserError: whatever is wrong, with file, line and key.
        """
        return cls(load_recipe(path_or_name, overrides or {}))

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, *, folder: str | Path = "."
    ) -> "Recipe":
        """From the same keys as in YAML; paths, tuples and numpy's numbers are understood.

        Args:
            folder: where relative paths are looked up, before the shipped data.

        Raises:
            UserError: as `from_yaml`.
        """
        return cls(recipe_of(values, Path(folder), overrides or {}))

    @property
    def name(self) -> str:
        """Its name; a run of it goes to runs/NAME unless told otherwise."""
        return self._checked.name

    @property
    def stages(self) -> dict[str, str]:
        """Name -> kind of each stage, in the order in which they run."""
        return {name: self._checked.stages[name].record.name for name in order(self._checked)}

    def override(self, overrides: Mapping[str, Any] | None = None, /, **more: Any) -> "Recipe":
        """Another recipe, with these values changed; as of `from_yaml`."""
        folder = self._checked.folder or Path()
        return Recipe(recipe_of(self.to_dict(), folder, {**(overrides or {}), **more}))

    def to_dict(self) -> dict[str, Any]:
        """Plain values with every default written out, as a run keeps them in RUN/recipe.yaml."""
        return self._checked.resolved()

    def to_yaml(self) -> str:
        """The same as text."""
        return self._checked.text()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.to_dict() == other.to_dict()

    __hash__ = None  # pyright: ignore[reportAssignmentType]: as Python does for a class with `__eq__`

    def __repr__(self) -> str:
        return f"Recipe({self.name!r}: {' -> '.join(self.stages)})"


def checked_recipe(recipe: Recipe | str | Path | Mapping[str, Any], overrides: Mapping[str, Any]) -> schema.Recipe:
    """A copy of its own for one run, which settles in it what `auto` and today are.

    Raises:
        UserError: whatever is wrong with it.
    """
    if isinstance(recipe, Recipe):
        made = recipe.override(overrides) if overrides else recipe
        return made._checked.model_copy(deep=True)
    if isinstance(recipe, Mapping):
        return recipe_of(recipe, Path(), overrides)
    if isinstance(recipe, str | Path):
        return load_recipe(recipe, overrides)
    said = f"is a {type(recipe).__name__}, expected a Recipe, a path, a shipped recipe's name or a mapping"
    raise UserError("recipe", said, "see preftune.Recipe")
