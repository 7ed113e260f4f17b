"""Stages that seeds and grids made, through the commands: what runs, what is kept, what is named."""

import json

import pytest
import yaml

from preftune.cli.status import status_of
from preftune.errors import UserError

SEEDS = ("seeds=[0, 1]", "stages.sft.seed=0")
DPO = ["dpo-seed0", "dpo-seed1"]


def test_each_variant_is_a_stage_that_is_kept(shop):
    assert set(shop.run(*SEEDS)) == {"sft", *DPO, "reward-seed0", "reward-seed1", "ppo-seed0", "ppo-seed1", "eval"}
    assert "dpo is 2 stages: dpo-seed0, dpo-seed1" in shop.said()
    # one more seed trains what is new alone, and a grid that varies one stage leaves the others
    assert set(shop.run("seeds=[0, 1, 2]", "stages.sft.seed=0")) == {"reward-seed2", "ppo-seed2", "dpo-seed2", "eval"}
    assert set(shop.run(*SEEDS, "stages.dpo.grid.beta=[0.1, 0.2]")) == {
        *(f"dpo-beta{beta}-seed{seed}" for beta in ("0_1", "0_2") for seed in (0, 1)),
        "eval",
    }
    said = json.loads((shop.path / "dpo-beta0_2-seed1" / "result").read_text())
    assert said == {"beta": 0.2}


def test_a_stage_by_its_name_in_the_recipe_is_all_of_its_variants(shop):
    assert shop.run(*SEEDS, until="dpo") == ["sft", *DPO]
    assert shop.run(*SEEDS, only="dpo", force=True) == DPO
    assert shop.run(*SEEDS, only="dpo-seed1", force=True) == ["dpo-seed1"]
    with pytest.raises(UserError, match="no such stage; did you mean 'dpo'"):
        shop.run(*SEEDS, only="dpp")


def test_the_runs_recipe_states_them_and_status_reads_it(shop):
    shop.run(*SEEDS)
    written = yaml.safe_load((shop.path / "recipe.yaml").read_text())
    assert written["expanded"]["dpo"] == DPO and written["stages"]["dpo-seed1"]["seed"] == 1
    assert written["eval"]["policies"] == ["sft", *DPO]
    assert [step.name for step in status_of(shop.path).steps if step.name.startswith("dpo")] == DPO
    shop.recipe = shop.path / "recipe.yaml"
    assert shop.run() == []
