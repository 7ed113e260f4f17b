"""A stage's name is that of its folder in the run, on every file system, and of nothing else there."""

import itertools
from pathlib import Path

import pytest

from preftune.errors import UserError
from preftune.models.adapters import module_name
from preftune.recipes.load import load_recipe

HEAD = "name: x\nmodel: {base: 'random:llama'}\ndata: {d: {path: quickstart/demos.jsonl}}\nstages:\n"


def load(folder: Path, *names: str) -> None:
    file = folder / "r.yaml"
    file.write_text(HEAD + "".join(f'  "{name}": {{kind: sft, data: d, from: base}}\n' for name in names), "utf-8")
    load_recipe(file)


@pytest.mark.parametrize(
    "name",
    [
        *("run.json", "recipe.yaml", "report.html", "doctor.json", "votes.jsonl", "base", "eval", "eval-cache"),
        *("Run.JSON", "EVAL", "Report.Html", "results.json", "x.partial", "x.old", "x.lock", "x.html"),
        *("..", ".", ".x", "a/b", "../x", "/x", "a\\\\b", "~", "", " ", "a b", "x.", "a" * 101, "é" * 60, "-x", "a:b"),
        *("a\\nb", "a\\0b", "\\x1b[31m", "<b>", "ｅｖａｌ"),
    ],
)
def test_a_name_that_is_another_files_or_leaves_the_run_is_refused(tmp_path: Path, name: str):
    with pytest.raises(UserError, match=r"is no name for a stage"):
        load(tmp_path, name)


@pytest.mark.parametrize("names", [("sft", "SFT"), ("Straße", "STRASSE"), ("caf\u00e9", "cafe\u0301"), ("ﬁx", "fix")])
def test_names_that_some_file_systems_take_for_one_are_refused(tmp_path: Path, names: tuple[str, str]):
    with pytest.raises(UserError, match=r"where the case of a name does not count|is no name for a stage"):
        load(tmp_path, *names)


def test_names_that_are_fine(tmp_path: Path):
    load(tmp_path, "sft", "a.b", "a_b", "a-b", "_x", "1", "Größe", "evaluation", "base2", "json")


def test_each_name_has_its_own_adapter():
    names = ["".join(each) for length in range(1, 6) for each in itertools.product("a._0", repeat=length)]
    made = [module_name(name) for name in names]
    assert len(set(made)) == len(names)
    assert not any("." in name for name in made)
