"""Seeds and grids of a recipe: a stage for each value, each with the parents of its own point."""

from pathlib import Path

import pytest
import yaml

from preftune.errors import UserError
from preftune.recipes.graph import parents
from preftune.recipes.load import load_recipe, recipe_of
from preftune.recipes.schema import Recipe

HEAD = """\
name: e
model: {base: "random:llama"}
data: {demos: {path: demos.jsonl}, pairs: {path: pairs.jsonl}}
stages:
  sft: {data: demos}
  reward: {data: pairs}
  dpo: {data: pairs}
  ppo: {reward: reward, data: demos}
"""


def loaded(tmp_path: Path, *overrides: str, text: str = HEAD) -> Recipe:
    (tmp_path / "e.yaml").write_text(text)
    return load_recipe(tmp_path / "e.yaml", overrides)


def refused(tmp_path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as found:
        loaded(tmp_path, *overrides)
    return str(found.value)


def test_each_seed_is_a_chain_of_its_own(tmp_path):
    recipe = loaded(tmp_path, "seeds=[0, 3]")
    assert list(recipe.stages) == [f"{name}-seed{seed}" for name in ("sft", "reward", "dpo", "ppo") for seed in (0, 3)]
    assert {name: stage.seed for name, stage in recipe.stages.items()} == {
        name: int(name[-1]) for name in recipe.stages
    }
    assert parents(recipe, "ppo-seed3") == ["sft-seed3", "reward-seed3"]
    assert recipe.expanded["dpo"] == ["dpo-seed0", "dpo-seed3"]


def test_a_grid_meets_its_parents_points_and_seeds_match(tmp_path):
    grid = "stages.dpo.grid={beta: [0.03, 0.1], train.learning_rate: [1e-5]}"
    recipe = loaded(tmp_path, "stages.sft.seeds=[1, 2]", "stages.dpo.seeds=[1, 2]", grid)
    names = [f"dpo-beta{beta}-learning_rate1e-05-seed{seed}" for beta in ("0_03", "0_1") for seed in (1, 2)]
    assert recipe.expanded["dpo"] == names
    first = recipe.stages[names[1]]
    assert (first.parent, first.seed, first.method()["beta"]) == ("sft-seed2", 2, 0.03)
    assert first.train["learning_rate"] == 1e-5
    # the reward model and PPO say nothing of seeds, and follow
    assert parents(recipe, "ppo-seed2") == ["sft-seed2", "reward-seed2"] and recipe.stages["ppo-seed2"].seed == 2


def test_what_follows_a_grid_has_its_parents_point_in_its_name(tmp_path):
    recipe = loaded(tmp_path, "stages.sft.grid.train.learning_rate=[1e-4, 2e-4]", "stages.ppo.grid.kl.coef=[0.05]")
    assert recipe.expanded["ppo"] == [f"ppo-sft_learning_rate{rate}-coef0_05" for rate in ("0_0001", "0_0002")]
    for name in recipe.expanded["ppo"]:
        rates = {recipe.stages[each].parent for each in parents(recipe, name)[1:]}
        assert rates == {parents(recipe, name)[0]}
        assert recipe.stages[name].method()["kl_coef"] == 0.05


def test_a_stage_with_a_seed_of_its_own_is_shared(tmp_path):
    recipe = loaded(tmp_path, "seeds=[0, 1]", "stages.sft.seed=7")
    assert recipe.stages["sft"].seed == 7 and "sft" not in recipe.expanded
    assert parents(recipe, "dpo-seed1") == ["sft"]


def test_the_evaluation_means_every_variant_and_the_resolved_recipe_loads_as_the_same(tmp_path):
    judged = "eval={prompts: demos, policies: [sft, dpo], reference: sft, judges: [{kind: reward, stage: reward}]}"
    recipe = loaded(tmp_path, "seeds=[0, 1]", "stages.sft.seed=0", judged)
    assert recipe.eval is not None
    assert recipe.eval.policies == ["sft", "dpo-seed0", "dpo-seed1"]
    assert [judge["stage"] for judge in recipe.eval.judges] == ["reward-seed0", "reward-seed1"]
    written = recipe.resolved()
    assert written["expanded"] == recipe.expanded and "seeds" not in yaml.safe_dump(written)
    again = recipe_of(written, tmp_path, ["eval.policies=[ppo]", "eval.reference=base", "stages.dpo-seed1.beta=0.3"])
    assert again.eval is not None and again.eval.policies == ["ppo-seed0", "ppo-seed1"]
    assert recipe_of(written, tmp_path).resolved() == written


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["seeds=3"], "expected a list of seeds"),
        (["seeds=[1, 1]"], "holds a value twice"),
        (["seeds=[-1]"], "expected whole numbers from 0"),
        (["seedss=[1]"], "did you mean 'seeds'"),
        (["stages.dpo.seedss=[1]"], "did you mean 'seeds'"),
        (["stages.dpo.grid=[1]"], "expected a mapping of keys to lists"),
        (["stages.dpo.grid.beta=0.1"], "expected a list of values"),
        (
            ["stages.dpo.grid.betta=[0.1, 0.2]"],
            "stages.dpo.betta: 'betta' is no key of stages.dpo; did you mean 'beta'?",
        ),
        (["stages.dpo.grid.seed=[1]"], "write seeds"),
        (["stages.dpo.grid.from=[sft]"], "from cannot be varied"),
        (["stages.dpo.seeds=[1]", "stages.dpo.seed=1"], "stands beside seed"),
        (["stages.sft.seeds=[0, 1]", "stages.dpo.seeds=[1, 2]"], "with the seeds [0, 1], and its own are [1, 2]"),
        (["stages.dpo.seeds=[0]", "stages.dpo-seed0={kind: dpo, data: pairs, from: sft}"], "the name of two stages"),
        ([f"seeds={list(range(17))}"], "make 68 stages of 4, expected at most 64"),
        (["seeds=[0, 1]", "eval={prompts: demos, reference: sft}"], "sft is 2 stages (sft-seed0, sft-seed1)"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, overrides, words):
    assert words in refused(tmp_path, *overrides)


def test_a_mistake_in_a_variant_is_said_once(tmp_path):
    assert refused(tmp_path, "seeds=[0, 1, 2]", "stages.dpo.bta=0.1").count("did you mean") == 1
