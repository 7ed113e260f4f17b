"""docs/recipes.md says every key of a recipe, as the loader reads it."""

import pytest

from preftune.eval.judges.kinds import KINDS as JUDGE_KINDS
from preftune.recipes import reference, schema
from preftune.recipes.json_schema import recipe_schema
from preftune.recipes.meanings import JUDGES, MEANINGS, PARTS
from preftune.recipes.schema import Part, Stage, stage_model
from preftune.stages.kinds import KINDS


def parts() -> dict[str, type[Part]]:
    """The parts of a recipe by name; a stage stands for its kinds."""
    return {each.__name__: each for each in vars(schema).values() if isinstance(each, type) and issubclass(each, Part)}


def keys(part: type[Part]) -> set[str]:
    return {info.alias or name for name, info in part.model_fields.items()}


def test_the_reference_is_up_to_date():
    said = reference.FILE.read_text(encoding="utf-8")
    assert said == reference.reference(), "run `python -m preftune.recipes.reference`"
    page = reference.NAMES.read_text(encoding="utf-8")
    assert page == reference.names(page), "run `python -m preftune.recipes.reference`"


def test_every_part_and_key_has_its_meaning_and_no_other():
    ours = {name: keys(part) for name, part in parts().items() if part is not Part}
    ours["Stage"] |= {"reward", "teacher", "kl", "rollout"}
    assert {name: set(meanings) for name, meanings in MEANINGS.items()} == ours
    assert PARTS.keys() == MEANINGS.keys()
    assert {name: set(fields) for name, fields in JUDGES.items()} == {k: set(v.fields) for k, v in JUDGE_KINDS.items()}


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_every_key_of_a_kind_is_in_the_reference(kind):
    page = reference.FILE.read_text(encoding="utf-8")
    own = page.partition(f"### kind: {kind.name}\n")[2].partition("\n#")[0]
    grouped = {key: f"{group}: {{{key}}}" for group, names in kind.groups.items() for key in names}
    expected = (keys(stage_model(kind)) - keys(Stage) - set(kind.groups)) | set(grouped.values())
    assert not [key for key in expected if f"| `{key}` |" not in own]
    assert all(parameter.help.replace("|", "\\|") in own for parameter in kind.parameters)


def test_an_editor_says_what_each_key_means():
    whole = recipe_schema()
    definitions = {"": whole, **whole["$defs"]}
    dumb = [
        f"{name}.{key}"
        for name, part in definitions.items()
        for key, own in part.get("properties", {}).items()
        if name != "stage" and not own.get("description")
    ]
    assert not dumb
