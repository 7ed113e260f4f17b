"""Over-optimisation from a recipe to its file and its command, on a random model."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from preftune.cli.chain import Chain, Options
from preftune.cli.keys import Keys, eval_needs, key_of
from preftune.cli.output import Output
from preftune.errors import UserError
from preftune.eval import overoptimisation as overoptimisation_run
from preftune.eval import workbench
from preftune.eval.judges.names import judge_name, only_compares
from preftune.eval.judges.registry import plan_judges
from preftune.eval.overoptimisation import eval_over_optimisation
from preftune.eval.report.page import write_report
from preftune.eval.workbench import Workbench
from preftune.models.loading import resolve_base
from preftune.recipes.build import eval_spec
from preftune.recipes.load import load_recipe

from ..cli.test_main import assert_refused, preftune

RECIPE = """\
name: t
model: {base: "random:llama", dtype: float32}
lora: {r: 4, alpha: 8}
data:
  demos: {path: demos.jsonl}
  pairs: {path: pairs.jsonl}
stages:
  sft: {data: demos, train: {max_steps: 1, learning_rate: 1e-3}}
  reward: {from: sft, data: pairs, train: {max_steps: 2, learning_rate: 1e-2}}
  ppo:
    from: sft
    reward: reward
    data: demos
    keep_every: 1
    rollout_batch_size: 4
    total_episodes: 16
    num_ppo_epochs: 2
    num_mini_batches: 1
    max_new_tokens: 6
    train: {learning_rate: 1e-2}
eval:
  prompts: demos
  policies: [sft, ppo]
  reference: sft
  max_new_tokens: 6
  temperature: 1.0
  judges:
    - {kind: reward, stage: reward}
    - {kind: function, name: vowels, function: "overopt_judge:vowels"}
    - {kind: endpoint, url: "http://127.0.0.1:9", model: far}
  over_optimisation: {gold: vowels, best_of: 4, prompts: 6}
"""
JUDGE = """\
def vowels(completions, **_):
    texts = [turns[-1]["content"] for turns in completions]
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in texts]

def shy(prompts, completions, **_):
    return [None if "3" in turns[-1]["content"] else 1.0 for turns in prompts]

def silent(completions, **_):
    return [None] * len(completions)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A recipe's folder with a finished run in `run`, the endpoint judge left out."""
    root = tmp_path_factory.mktemp("overopt")
    (root / "t.yaml").write_text(RECIPE)
    (root / "overopt_judge.py").write_text(JUDGE)
    rows = {
        "demos": [{"prompt": f"question {i}", "completion": "an answer"} for i in range(8)],
        "pairs": [{"prompt": f"question {i}", "chosen": "yes please", "rejected": "no"} for i in range(8)],
    }
    for name, lines in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = load_recipe(root / "t.yaml")
    assert recipe.eval is not None
    del recipe.eval.judges[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        Chain(recipe, Options(output_dir=root / "run"), Output()).run()
    return root


@pytest.fixture
def spec(made: Path, monkeypatch):
    monkeypatch.syspath_prepend(str(made))
    return eval_spec(load_recipe(made / "run" / "recipe.yaml"), resolve_base("random:llama"), made / "run")


def test_the_file_holds_both_ways(made: Path):
    content = json.loads((made / "run" / "eval" / "overoptimisation.json").read_text())
    assert {key: content[key] for key in ("proxy", "gold", "prompts", "start")} == {
        "proxy": "reward", "gold": "vowels", "prompts": 6, "start": "sft",
    }  # fmt: skip
    ppo, best = content["methods"]
    assert (ppo["method"], best["method"]) == ("ppo", "best_of_n")
    assert [(each["label"], each["step"]) for each in ppo["points"]] == [(f"step {i}", i) for i in (0, 2, 4, 6, 8)]
    assert [(each["label"], each["n"]) for each in best["points"]] == [(f"n = {n}", n) for n in (1, 2, 4)]
    start, *others = ppo["points"]
    # both begin at the same place: the mean of all replies of the start
    assert all(start[side] == pytest.approx(best["points"][0][side], abs=1e-12) for side in ("proxy", "gold"))
    assert (start["kl"], start["kl_se"]) == (0, 0) and all(each["kl"] > 0 and each["kl_se"] > 0 for each in others)
    assert [each["kl"] for each in best["points"]] == pytest.approx([0, math.log(2) - 0.5, math.log(4) - 0.75])
    proxies = [each["proxy"] for each in best["points"]]
    assert proxies == sorted(proxies) and proxies[0] < proxies[-1]
    assert ppo["fit"]["form"] == "d (alpha - beta log d)" and best["fit"] is None  # two points off zero
    for side in ("proxy", "gold"):
        assert {"alpha", "alpha_se", "beta", "beta_se", "peak", "points"} == set(ppo["fit"][side])
        assert ppo["fit"][side]["alpha_se"] > 0 and ppo["fit"][side]["points"] == 4
    assert "upper bound" in best["kl_is"] and best["peak"] == "gold: nothing fitted, fewer than 3 points off zero"
    peak, furthest = ppo["fit"]["gold"]["peak"], max(each["kl"] for each in others)
    expected = f"no peak was seen up to KL {furthest:.3g}" if peak is None else f"highest at KL {peak**2:.3g} (d ="
    assert expected in ppo["peak"]
    # where the stage was written is no part of how it was made
    assert ".partial" not in (made / "run" / "ppo" / "lineage.json").read_text()
    assert "overoptimisation" not in json.loads((made / "run" / "run.json").read_text())["stages"]
    assert "best of n" in write_report(made / "run").read_text()


def test_numbers_are_those_of_the_replies(made: Path, spec, monkeypatch):
    """Points against an account of their own, from the replies that were drawn."""
    drawn = {}
    true = workbench.generate_samples

    def generate(adapters, role, name, *args, **options):
        drawn[name] = true(adapters, role, name, *args, **options)
        return drawn[name]

    monkeypatch.setattr(workbench, "generate_samples", generate)
    content = eval_over_optimisation(spec, made / "run")
    assert content == json.loads((made / "run" / "eval" / "overoptimisation.json").read_text())
    assert {name: len(replies) for name, replies in drawn.items()} == {
        "start": 24, **{f"ppo step {i}": 6 for i in (2, 4, 6, 8)},
    }  # fmt: skip
    vowels = {
        name: [sum(c in "aeiou" for c in each.completion) / max(1, len(each.completion)) for each in replies]
        for name, replies in drawn.items()
    }
    points = {each["label"]: each for each in content["methods"][0]["points"]}
    assert points["step 0"]["gold"] == pytest.approx(np.mean(vowels["start"]))
    for step in (2, 4, 6, 8):
        given = vowels[f"ppo step {step}"]
        assert points[f"step {step}"]["gold"] == pytest.approx(np.mean(given))
        assert points[f"step {step}"]["gold_se"] == pytest.approx(np.std(given, ddof=1) / 6**0.5)
    # a prompt's replies stand together
    assert [each.prompt.messages for each in drawn["start"]] == [
        each.prompt.messages for each in drawn["ppo step 2"] for _ in range(4)
    ]


def test_policies_leave_the_base_as_they_found_it(made: Path, spec):
    bench = Workbench.open(replace(spec, policies={}, reference="base"))
    before, names = bench.adapters.digest(None), list(bench.adapters.names)
    with bench.holding(made / "run" / "ppo") as outer, bench.holding(made / "run" / "ppo") as inner:
        assert outer == inner and outer in bench.adapters.names
    assert (bench.adapters.digest(None), list(bench.adapters.names), bench.loaded) == (before, names, {})
    with bench.holding(made / "run" / "reward") as role:
        assert role in bench.adapters.heads
    assert not bench.adapters.heads
    with bench.holding(None) as role:
        assert role is None
    with pytest.raises(RuntimeError, match="stop"), bench.holding(made / "run" / "sft"):
        raise RuntimeError("stop")
    assert list(bench.adapters.names) == names


def test_prompts_without_a_score_are_left_out(made: Path, spec, capsys):
    shy, silent = ({"kind": "function", "function": f"overopt_judge:{name}"} for name in ("shy", "silent"))
    wanted = replace(spec.over_optimisation, gold="shy")
    content = eval_over_optimisation(replace(spec, judges=(*spec.judges, shy), over_optimisation=wanted), made / "run")
    assert content["prompts"] == 5 and "1 prompts left out" in capsys.readouterr().err
    # a judge that never differs: no gain, known without error
    gold = content["methods"][0]["fit"]["gold"]
    assert (gold["alpha"], gold["alpha_se"], gold["peak"]) == (0, 0, None)
    wanted = replace(wanted, gold="silent")
    with pytest.raises(UserError, match="no prompt has a score of both judges"):
        eval_over_optimisation(replace(spec, judges=(*spec.judges, silent), over_optimisation=wanted), made / "run")


def test_the_command(made: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(made))
    code, out, _ = preftune(
        capsys, "eval", "over-optimisation", made / "run", "--best-of", "8", "--prompts", "4", "--json"
    )
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["label"] for row in rows if row["method"] == "best_of_n" and "label" in row] == [
        "n = 1", "n = 2", "n = 4", "n = 8"
    ]  # fmt: skip
    assert all(row["sqrt_kl"] ** 2 == pytest.approx(row["kl"]) for row in rows if "label" in row)
    assert [(row["method"], row["side"]) for row in rows if "form" in row] == [
        (method, side) for method in ("ppo", "best_of_n") for side in ("proxy", "gold")
    ]
    # without the section
    run = tmp_path
    for name in ("sft", "reward", "ppo"):
        (run / name).symlink_to(made / "run" / name)
    recipe = load_recipe(made / "run" / "recipe.yaml")
    assert recipe.eval is not None
    recipe.eval.over_optimisation = None
    said = yaml.safe_dump(recipe.resolved())
    assert "over_optimisation" not in said
    (run / "recipe.yaml").write_text(said)
    command = ("eval", "over-optimisation", run)
    assert_refused(preftune(capsys, *command), "--gold", "reward, vowels")
    assert_refused(preftune(capsys, *command, "--gold", "vowel"), "gold", "no judge 'vowel'", "vowels")
    assert_refused(preftune(capsys, *command, "--gold", "reward"), "gold", "the proxy as well")
    assert_refused(preftune(capsys, *command, "--gold", "vowels", "--best-of", "1"), "--best-of", "2 or more")
    code, out, _ = preftune(capsys, *command, "--gold", "vowels", "--best-of", "2", "--prompts", "1")
    assert code == 0 and "proxy reward, gold vowels, 1 prompts, from sft" in out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("gold=reward", ("over_optimisation.gold", "the proxy as well")),
        ("gold=vowel", ("over_optimisation.gold", "no judge 'vowel'", "vowels")),
        ("proxy=rewards", ("over_optimisation.proxy", "no judge 'rewards'", "reward")),
        ("gold=far", ("over_optimisation.gold", "compares two replies", "reward, vowels")),
        ("best_of=1", ("over_optimisation.best_of", "is 1")),
        ("prompts=0", ("over_optimisation.prompts", "is 0")),
        ("policy=sft", ("over_optimisation.policy", "no PPO stage 'sft'", "ppo")),
        ("golden=1", ("golden", "did you mean 'gold'")),
        ("prompts=2 eval.temperature=0 eval.kl=false", ("eval.over_optimisation", "greedy decoding")),
    ],
)
def test_what_a_recipe_may_not_say(made: Path, change: str, words: tuple[str, ...]):
    with pytest.raises(UserError) as caught:
        load_recipe(made / "t.yaml", f"eval.over_optimisation.{change}".split())
    said = str(caught.value)
    assert "\n" not in said and all(word in said for word in words), said


def test_a_proxy_that_does_not_follow_must_be_named(made: Path):
    changes = ["stages.ppo.reward={function: overopt_judge:vowels}"]
    with pytest.raises(UserError, match=r"proxy.*no judge reads the reward stage that ppo trains on"):
        load_recipe(made / "t.yaml", changes)
    part = load_recipe(made / "t.yaml", [*changes, "eval.over_optimisation.proxy=reward"]).eval
    assert part is not None and (part := part.over_optimisation) is not None
    assert (part.proxy, part.policy, part.best_of) == ("reward", "ppo", 4)


def test_what_is_not_there_is_refused_before_anything_is_loaded(made: Path, spec, tmp_path: Path):
    def refused(**changes) -> str:
        wanted = replace(spec.over_optimisation, **changes)
        with pytest.raises(UserError) as caught:
            overoptimisation_run.check_over_optimisation(replace(spec, over_optimisation=wanted))
        return str(caught.value)

    assert "no finished PPO stage" in refused(folder=tmp_path)
    assert "was trained from another adapter than the reward" in refused(start=made / "run" / "reward")
    assert "no judge that scores is called 'x'" in refused(gold="x")
    with pytest.raises(UserError, match=r"eval\.over_optimisation.*greedy"):
        replace(spec, temperature=0.0, kl=False)


def test_judges_are_called_what_their_plans_are_called(made: Path, tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(str(made))
    (tmp_path / "votes.jsonl").write_text("")
    (tmp_path / "model").mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "model.safetensors").touch()
    (tmp_path / "somewhere").mkdir()
    (tmp_path / "somewhere" / "adapter_config.json").write_text("{}")
    far = {"kind": "endpoint", "url": "http://127.0.0.1:9", "model": "far"}
    judges = [
        {"kind": "rubric", "checks": [{"kind": "max_words", "value": 2}]},
        {"kind": "reward", "stage": "rm"},
        {"kind": "reward", "adapter": str(tmp_path / "somewhere")},
        {"kind": "function", "function": "overopt_judge:vowels"},
        {"kind": "model", "model": str(tmp_path / "model")},
        far,
        far | {"mode": "score", "name": "scores"},
    ]
    assert [judge_name(each) for each in judges] == [plan.name for plan in plan_judges(judges, tmp_path)]
    assert [only_compares(each) for each in judges] == [False] * 5 + [True, False]
    people = {"kind": "human", "votes": "votes.jsonl"}
    assert judge_name(people) == "human" and only_compares(people)


def test_the_evaluations_key_covers_the_section(made: Path):
    def key(*overrides: str) -> str:
        recipe = load_recipe(made / "t.yaml", overrides)
        known = dict.fromkeys(recipe.stages, "a")
        return key_of(Keys(recipe, resolve_base("random:llama"), made / "run").evaluation(known))

    same = key()
    assert key("eval.over_optimisation.proxy=reward", "eval.over_optimisation.policy=ppo") == same
    for change in ("best_of=8", "prompts=3", "gold=reward", "gold=vowels"):
        name, value = change.split("=")
        overrides = [f"eval.over_optimisation.{name}={value}"]
        if value == "reward":
            overrides.append("eval.over_optimisation.proxy=vowels")
        assert (key(*overrides) == same) == (value == "vowels")
    recipe = load_recipe(made / "t.yaml", ["eval.policies=[sft]"])
    assert recipe.stages["ppo"].method()["keep_every"] == 1
    assert eval_needs(recipe) == ["sft", "reward", "ppo"]
