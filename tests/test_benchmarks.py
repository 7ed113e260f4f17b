"""The benchmarks' own words: recipes take their overrides, tables and figures come out of their numbers."""

import pytest

from preftune.benchmarks import frontier, ppo_seeds
from preftune.benchmarks.measure import summary
from preftune.benchmarks.quick import LONGER, RECIPE, rubric_scores
from preftune.recipes.load import load_recipe


def test_the_frontiers_trials_are_what_their_names_say():
    trials = {trial.name: trial for trial in frontier._trials(seed=2)}
    groups = [(name, beta) for name, betas in frontier.GROUP_BETAS.items() for beta in betas]
    assert len(trials) == len(frontier.KL_TARGETS) + len(frontier.BETAS) + len(groups) + 1
    assert all(trial.seed == 2 for trial in trials.values())
    for target in frontier.KL_TARGETS:
        stage = load_recipe(RECIPE, trials[f"PPO, target {target}"].overrides).stages["ppo"]
        assert stage.method()["kl_target"] == target
        assert [each.function for each in stage.rewards] == ["preftune.benchmarks.quick:rubric_scores"]
    for beta in frontier.BETAS:
        assert load_recipe(RECIPE, trials[f"DPO, beta {beta}"].overrides).stages["dpo"].method() == {"beta": beta}
    longer = load_recipe(RECIPE, LONGER).stages["ppo"]
    for name, beta in groups:
        trial = trials[f"{name}, beta {beta}"]
        stage = load_recipe(RECIPE, trial.overrides).stages[trial.stage]
        assert (stage.kind, stage.method()["beta"]) == (trial.stage, beta) == (name.lower(), beta)
        same = ("rollout_batch_size", "total_episodes", "max_new_tokens", "temperature")
        assert all(stage.method()[key] == longer.method()[key] for key in same)
        assert stage.train == longer.train


def test_the_rubric_as_a_reward_tells_a_good_reply_from_a_bad_one():
    good = "I'm sorry the lamp came broken. Please send a photo of it and we will send you a new one today."
    scores = rubric_scores([], [[{"role": "assistant", "content": text}] for text in (good, "no")])
    assert 5 >= scores[0] > scores[1] >= 0


def test_figures_and_tables_of_the_seeds(tmp_path):
    curves = {key: [0.0, 1.0] for key in ppo_seeds.CURVES} | {"episode": [32, 64]}
    score = {"rubric": 0.8, "kl": 5.0, "length": 40.0, "ended": 0.95}
    result = {
        "kl_target": 6.0,
        "sft": score | {"rubric": 0.7},
        "seeds": [score | {"seed": seed, "collapsed": seed == 1, "curves": curves} for seed in range(2)],
    }
    lines = ppo_seeds.table(result).splitlines()
    assert lines[2].startswith("| SFT | 0.700")
    assert [line.rstrip(" |").rpartition("| ")[2] for line in lines[3:]] == ["no", "yes"]
    ppo_seeds.draw(result, tmp_path / "seeds.svg")
    drawn = (tmp_path / "seeds.svg").read_text()
    assert all(title in drawn for title in (*ppo_seeds.CURVES.values(), "target"))


def test_figures_and_tables_of_the_frontier(tmp_path):
    points = [
        {"name": name, "seed": seed, "kl": kl, "rubric": rubric + seed / 10, "length": 40.0}
        for name, kl, rubric in (("PPO, target 1", 1.0, 0.7), ("DPO, beta 0.1", 4.0, 0.75), ("best of 2", 0.19, 0.72))
        for seed in (0, 1)
    ]
    assert "| PPO, target 1 | 1.00 | 0.750 | 0.700, 0.800 | 40.0 |" in frontier.table(points)
    frontier.draw(points, tmp_path / "frontier.svg")
    drawn = (tmp_path / "frontier.svg").read_text()
    assert all(said in drawn for said in ("target 1", "beta 0.1", "best of 2"))


@pytest.mark.parametrize("name", ["ppo_seeds", "frontier"])
def test_committed_figures_have_their_numbers(name):
    results = frontier.RESULTS
    if not (results / f"{name}.json").is_file():
        pytest.skip("not measured yet")
    assert (results / f"{name}.svg").is_file()


def test_a_sides_runs_are_summed_up():
    runs = [{"rows_per_second": rate, "peak_memory_bytes": rate * 1e9} for rate in (3.0, 1.0, 2.0)]
    assert summary(runs, "rows_per_second") == {"rows_per_second": 2.0, "peak_memory_gb": 3.0, "runs": runs}
