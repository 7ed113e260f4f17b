"""Data entries that are the rows of a stage: what the schema, the graph and the expansion make of them."""

from pathlib import Path

import pytest

from preftune.errors import UserError
from preftune.files import ROWS
from preftune.models.base import Base
from preftune.recipes.build import data_spec, stage_job
from preftune.recipes.graph import data_stage, lines_of_descent, needed_for, order, parents, policies, unused_stages
from preftune.recipes.load import load_recipe
from preftune.recipes.schema import Recipe

RECIPE = """\
name: t
model: {base: "random:llama", dtype: float32}
data:
  demos: {path: demos.jsonl}
  prompts: {path: prompts.jsonl}
stages:
  dpo2: {kind: dpo, from: dpo1, data: {stage: pairs2}}
  pairs2: {kind: sample, from: dpo1, data: prompts, reward: {function: "m:f"}}
  dpo1: {kind: dpo, data: first}
  pairs1: {kind: sample, data: prompts, reward: {function: "m:f"}}
  sft: {data: demos}
"""
ENTRY = "  first: {stage: pairs1, held_out: 0.1, max_length: 64}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "t.yaml"
    file.write_text(RECIPE.replace("stages:\n", f"{ENTRY}stages:\n"))
    return file


def test_an_entry_may_stand_in_the_stage_or_have_a_name(file: Path) -> None:
    recipe = load_recipe(file)
    assert {name: entry.stage for name, entry in recipe.data.items() if entry.stage} == {
        "first": "pairs1",
        "pairs2": "pairs2",
    }
    assert (recipe.data["first"].held_out, recipe.data["first"].max_length) == (0.1, 64)
    assert recipe.stages["dpo2"].data == "pairs2"
    # what a run writes down is the same recipe again
    again = file.with_name("again.yaml")
    again.write_text(recipe.text())
    assert load_recipe(again).resolved() == recipe.resolved()


def test_the_graph_follows_the_rows(file: Path) -> None:
    recipe = load_recipe(file)
    assert order(recipe) == ["sft", "pairs1", "dpo1", "pairs2", "dpo2"]
    assert parents(recipe, "dpo1") == ["sft", "pairs1"]
    assert (data_stage(recipe, "dpo1"), data_stage(recipe, "sft")) == ("pairs1", None)
    assert needed_for(recipe, ["dpo1"]) == ["sft", "pairs1", "dpo1"]
    assert policies(recipe) == ["sft", "dpo1", "dpo2"]
    assert lines_of_descent(recipe)[1:3] == ["pairs1 (from sft, rewards: m:f)", "dpo1 (from sft, rows: pairs1)"]
    assert unused_stages(recipe) == []
    file.write_text(file.read_text().replace("data: {stage: pairs2}", "data: first"))
    assert unused_stages(load_recipe(file)) == ["pairs2"]
    assert unused_stages(load_recipe(file, ["stages.pairs2.keep=all"])) == []  # they are to be looked at


def test_rows_are_looked_up_in_the_run_and_nowhere_before(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file)
    base = Base("random:llama", tmp_path, None, "")
    job = stage_job(recipe, "dpo1", base, tmp_path / "run", tmp_path / "run" / "dpo1")
    assert job.folders[0] == tmp_path / "run"
    assert [source.path for source in job.data.sources] == [f"pairs1/{ROWS}"]
    assert data_spec(recipe.data["first"], 0).held_out == 0.1
    sft = stage_job(recipe, "sft", base, tmp_path / "run", tmp_path / "run" / "sft")
    assert sft.folders == (tmp_path,)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.dpo1.from=pairs1", "stages.dpo1.from: 'pairs1' samples rows and trains nothing, expected a policy; "),
        ("stages.pairs1.from=dpo1", "a circle: dpo1 -> pairs1 -> dpo1; let one of them start from base, or read other"),
        (
            "stages.pairs1.keep=best",
            r"stages.dpo1.data: reads pairs, and pairs1 samples demonstrations or prompts; set ",
        ),
        ("stages.pairs1.keep=all", "reads pairs, and pairs1 samples replies and their scores for people to look at"),
        ("data.first.stage=sft", "data.first.stage: stage 'sft' is of kind sft, expected one that samples rows; use "),
        (
            "data.first.stage=pears1",
            "data.first.stage: no stage 'pears1', expected one that samples rows; did you mean ",
        ),
        ("data.first.path=x.jsonl", "data.first.path: stands beside stage, whose rows are read as it wrote them"),
        ("data.first.columns={prompt: q}", "data.first.columns: stands beside stage"),
        ("stages.dpo2.data={stage: pairs1, limit: 3}", None),
        ("stages.dpo2.data={path: x.jsonl}", "expected the name of a data entry, or {stage: NAME}"),
        ("stages.pairs1.train={max_steps: 3}", "stages.pairs1.train: has no effect: a sample stage trains nothing"),
        ("stages.pairs1.lora={r: 4}", "stages.pairs1.lora: has no effect: a sample stage trains nothing"),
        ("stages.pairs1.on_nonfinite=skip(2)", "stages.pairs1.on_nonfinite: has no effect"),
        ("stages.pairs1.reward=sft", "stage 'sft' is of kind sft, expected a reward stage"),
        ("stages.pairs1.n=0", "stages.pairs1.n: is 0, expected at least 1"),
        ("stages.pairs1.keep=worst", "stages.pairs1.keep: is 'worst', expected"),
        ("eval={prompts: first}", "eval.prompts: the evaluation's prompts are there before anything trains"),
        ("eval={prompts: prompts, policies: [pairs1]}", "'pairs1' is no policy (it samples rows)"),
        ("eval={prompts: prompts, judges: [{kind: reward, stage: pairs1}]}", "no reward stage 'pairs1'"),
    ],
)
def test_what_does_not_fit_is_refused_when_the_recipe_is_read(file: Path, override: str, said: str | None) -> None:
    if said is None:
        assert load_recipe(file, [override]).data["pairs1"].limit == 3
        return
    with pytest.raises(UserError) as caught:
        load_recipe(file, [override])
    assert said in str(caught.value)


def test_one_entry_in_two_stages_says_the_same(file: Path) -> None:
    file.write_text(file.read_text() + "  kto: {from: dpo1, data: {stage: pairs2, limit: 3}}\n")
    with pytest.raises(UserError, match=r"stages\.kto\.data: the data entry 'pairs2' says something else"):
        load_recipe(file)


def test_a_rank_of_its_own_is_no_hindrance_to_sample_from(file: Path) -> None:
    recipe = load_recipe(file, ["stages.dpo1.lora={r: 32, alpha: 64}", "stages.dpo2.lora={r: 32, alpha: 64}"])
    assert order(recipe)[-1] == "dpo2"


def rows(recipe: Recipe) -> dict[str, tuple[str, str | None]]:
    return {name: (stage.parent, data_stage(recipe, name)) for name, stage in recipe.stages.items()}


def test_a_stage_that_reads_sampled_rows_varies_as_what_samples_them(file: Path) -> None:
    found = rows(load_recipe(file, ["stages.pairs1.seeds=[0, 1]"]))
    assert found["dpo1-seed1"] == ("sft", "pairs1-seed1")
    assert found["pairs2-seed1"] == ("dpo1-seed1", None)
    assert found["dpo2-seed0"] == ("dpo1-seed0", "pairs2-seed0")
    assert len(found) == 9
    recipe = load_recipe(file, ["stages.pairs1.grid={n: [2, 4]}"])
    assert rows(recipe)["dpo1-pairs1_n4"] == ("sft", "pairs1-n4")
    assert recipe.data["first-n4"].held_out == 0.1
    assert "first" not in recipe.data


def test_seeds_of_all_stages_stay_together(file: Path) -> None:
    found = rows(load_recipe(file, ["seeds=[3, 4]"]))
    assert found["dpo2-seed4"] == ("dpo1-seed4", "pairs2-seed4")
    assert found["pairs2-seed3"] == ("dpo1-seed3", None)
    assert len(found) == 10
