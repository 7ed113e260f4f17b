"""The tables of docs/migrating name keys that exist, and say what a recipe answers to the other tool's word."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from preftune.cli.main import app
from preftune.recipes import schema
from preftune.recipes.schema import stage_model
from preftune.stages.fields import FIELDS, TRAINING
from preftune.stages.kinds import KINDS, StageKind
from preftune.stages.names import ALIASES, meant

FOLDER = Path(__file__).parents[2] / "docs" / "migrating"
PAGES = ("trl.md", "llama-factory.md", "axolotl.md")
Row = tuple[str, str, str]


def rows() -> list[Row]:
    """(page, their key, ours or "-") of every row."""
    found = []
    for page in PAGES:
        text = (FOLDER / page).read_text(encoding="utf-8")
        table = re.findall(r"^\| `([^`]+)` \| (?:`([^`]+)`|(-)) \|", text, re.MULTILINE)
        assert len(table) > 30, page
        found += [(page, theirs, ours or none) for theirs, ours, none in table]
    return found


def of_kind(kind: StageKind) -> set[str]:
    model = stage_model(kind)
    own = {info.alias or name for name, info in model.model_fields.items()}
    grouped = {f"{group}.{key}" for group, keys in kind.groups.items() for key in keys}
    table = FIELDS.get(kind.config.rpartition(":")[2], TRAINING)
    return own | grouped | {f"train.{name}" for name, field in table.items() if field.state == "works"}


def known() -> set[str]:
    """Every key of a recipe, written with dots, and every option of `preftune run`."""
    parts = {"": schema.Recipe, "model.": schema.Model, "lora.": schema.Lora, "data.NAME.": schema.Data}
    found = {
        f"{place}{info.alias or name}" for place, part in parts.items() for name, info in part.model_fields.items()
    }
    for kind in KINDS.values():
        found |= {f"stages.{kind.name}"} | {
            f"stages.{place}.{key}" for key in of_kind(kind) for place in ("NAME", kind.name)
        }
    run = get_command(app).commands["run"]  # pyright: ignore[reportAttributeAccessIssue]
    return found | {option for each in run.params for option in each.opts}


def test_every_key_that_a_table_names_exists():
    missing = [row for row in rows() if row[2] != "-" and row[2].partition(":")[0] not in known()]
    assert not missing


def answers(word: str) -> list[str]:
    """What a recipe says to the word, wherever it stands."""
    parts = (*ALIASES, "train")
    said = (meant(word, part, kind, "x") for part in parts for kind in (None, *KINDS.values()))
    return [each for each in said if each is not None]


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row[0]}-{row[1]}")
def test_a_table_says_what_a_recipe_answers(row: Row):
    _, theirs, ours = row
    said = answers(theirs)
    if theirs in ours.split(".") or not said or ":" in theirs:
        return
    if ours == "-":
        assert any(each.startswith("leave it out") or "leave it out" in each for each in said), said
        return
    last = ours.partition(":")[0].rpartition(".")[2]
    assert any(re.search(rf"(?<![\w-]){re.escape(last)}\b", each) for each in said), said
