"""Reading recipes: what is wrong is said in one line with file, line and key; overrides; shipped recipes."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from preftune.errors import UserError, UserErrors
from preftune.models.base import Base
from preftune.recipes.build import data_spec, eval_spec, stage_job
from preftune.recipes.graph import lines_of_descent, needed_for, order, parents
from preftune.recipes.load import load_recipe, shipped_recipes
from preftune.recipes.schema import Recipe, stage_model
from preftune.recipes.text import parse, parse_value
from preftune.stages.kinds import PPO

RECIPE = """\
name: t
model: {base: "random:llama"}
data:
  demos: {path: demos.jsonl}
  pairs: {path: quickstart/pairs.jsonl, held_out: 1e-1}
stages:
  ppo: {from: sft, reward: reward, data: demos, kl: {coef: 0.05, in: loss}}
  sft: {data: demos, train: {learning_rate: 2e-4, eval_strategy: no}}
  reward: {from: sft, data: pairs}
  ipo:
    kind: dpo
    from: sft
    data: pairs
    beta: 0.1
eval:
  prompts: demos
  judges: [{kind: reward, stage: reward}]
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "t.yaml"
    file.write_text(RECIPE)
    (tmp_path / "demos.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return file


def refused(file: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(file, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_numbers_and_words_are_read_as_meant(recipe_file: Path):
    recipe = load_recipe(recipe_file)
    assert recipe.stages["sft"].train.items() >= {"learning_rate": 2e-4, "eval_strategy": "no"}.items()
    assert recipe.data["pairs"].held_out == 0.1
    assert parse_value("[1e3, 010, off, true, null, -.5, 1.5e+2, 1:30, 2024-01-02]", "x") == [
        1000.0, 10, "off", True, None, -0.5, 150.0, "1:30", "2024-01-02"
    ]  # fmt: skip
    assert parse("a: &x {b: 1}\nc: {<<: *x, d: 2}", "x").values["c"] == {"b": 1, "d": 2}


def test_paths_beside_the_recipe_become_absolute_and_shipped_ones_stay(recipe_file: Path):
    recipe = load_recipe(recipe_file)
    assert recipe.data["demos"].path == str(recipe_file.parent / "demos.jsonl")
    assert recipe.data["pairs"].path == "quickstart/pairs.jsonl"


def test_a_path_on_the_command_line_is_meant_from_here(recipe_file: Path, tmp_path: Path, monkeypatch):
    here = tmp_path / "elsewhere"
    here.mkdir()
    (here / "mine.jsonl").write_text("{}")
    monkeypatch.chdir(here)
    recipe = load_recipe(recipe_file, ["data.demos.path=mine.jsonl"])
    assert recipe.data["demos"].path == str(here / "mine.jsonl")


def test_resolved_recipe_loads_back_as_the_same(recipe_file: Path, tmp_path: Path):
    recipe = load_recipe(recipe_file, ["data.demos.max_length=null", "stages.ipo.lora={r: 32, alpha: 64}"])
    again = tmp_path / "again" / "recipe.yaml"
    again.parent.mkdir()
    again.write_text(yaml.safe_dump(recipe.resolved(), sort_keys=False))
    assert load_recipe(again).resolved() == recipe.resolved()


def test_overrides(recipe_file: Path):
    recipe = load_recipe(
        recipe_file,
        ["stages.ipo.beta=2e-1", "stages.ipo.train.max_steps=3", "eval.judges.0.name=rm", "stages.ppo=null", "seed=7"],
    )
    assert recipe.stages["ipo"].method()["beta"] == 0.2
    assert recipe.stages["ipo"].train["max_steps"] == 3
    assert recipe.eval is not None and recipe.eval.judges[0] == {"kind": "reward", "stage": "reward", "name": "rm"}
    assert "ppo" not in recipe.stages and recipe.seed == 7


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("stages.ipo.bta=1", ["stages.ipo.bta", "did you mean 'beta'?"]),
        ("stages.ip.beta=1", ["no 'ip' in stages", "did you mean 'ipo'?"]),
        ("stages.ipo.learning_rate=1", ["stands beside train", "stages.ipo.train"]),
        ("stages.ipo.train.beta=1", ["said twice", "0.1"]),
        ("stages.ppo.train.kl_coef=1", ["said twice", "0.05"]),
        ("stages.ppo.kl.cof=1", ["stages.ppo.kl.cof", "did you mean 'coef'?"]),
        ("stages.ppo.kl.in=los", ["'los'", "'reward' or 'loss'"]),
        ("stages.ppo.reward=sft", ["'sft' is of kind sft", "reward"]),
        ("stages.ppo.reward=[{stage: reward, wait: 2}]", ["reward.0.wait", "'weight'"]),
        ("stages.sft.from=ipo", ["a circle", "sft -> ipo -> sft"]),
        ("stages.ipo.from=stf", ["no stage 'stf'", "did you mean 'sft'?"]),
        ("stages.ipo.from=reward", ["'reward' is a reward model"]),
        ("stages.ipo.data=pair", ["no data entry 'pair'", "did you mean 'pairs'?"]),
        ("stages.ipo.kind=ipo", ["no kind of stage", "loss_type: ipo"]),
        ("data.demos.pth=3", ["data.demos.pth", "did you mean 'path'?"]),
        ("data.pairs.held_out=2", ["held_out", "less than 1"]),
        ("data.demos.sources=[{path: x}]", ["data.demos.sources: stands beside path"]),
        ("model.dtype=fp32", ["'fp32'", "'bfloat16'"]),
        ("lora.r=0", ["lora.r", "at least 1"]),
        ("lora.rank=8", ["lora.rank", "did you mean 'r'?"]),
        ("eval.policies=[bse]", ["'bse' is no policy", "did you mean 'base'?"]),
        ("eval.policies=[reward]", ["'reward' is no policy"]),
        ("eval.prompts=demo", ["no data entry", "did you mean 'demos'?"]),
        ("eval.judges.0.stage=rewrd", ["no reward stage 'rewrd'", "did you mean 'reward'?"]),
        ("sed=1", ["'sed' is no key of a recipe", "did you mean 'seed'?"]),
        ("seed", ["expected key=value"]),
        ("stages.eval={kind: dpo, data: pairs}", ["'eval' is no name for a stage"]),
    ],
)
def test_what_is_wrong_is_said_with_its_place_and_remedy(recipe_file: Path, override: str, parts: list[str]):
    said = refused(recipe_file, override)
    assert said.startswith(f"command line ({override})")
    for part in parts:
        assert part in said


@pytest.mark.parametrize(
    ("old", "new", "line", "part"),
    [
        ("    beta: 0.1", "    bata: 0.1", 14, "stages.ipo.bata"),
        ("    data: pairs\n    beta", "    beta: 0.2\n    data: pairs\n    beta", 15, "stands on line 13 too"),
        ("    kind: dpo\n", "", 10, "lacks its kind"),
        ("    data: pairs\n", "", 10, "stages.ipo lacks 'data'"),
        ("    beta: 0.1", "    beta: much", 14, "expected a number"),
        ("from: sft, reward", "from: [sft, reward", 7, "broken YAML"),
    ],
)
def test_errors_in_the_file_name_their_line(recipe_file: Path, old: str, new: str, line: int, part: str):
    recipe_file.write_text(RECIPE.replace(old, new))
    said = refused(recipe_file)
    assert said.startswith(f"{recipe_file}:{line}: ")
    assert part in said


def test_a_rubric_may_lie_in_a_file_and_becomes_part_of_the_recipe(recipe_file: Path):
    (recipe_file.parent / "mine.yaml").write_text("- {name: short, kind: max_words, value: 9}\n")
    recipe = load_recipe(recipe_file, ["eval.judges=[{kind: rubric, checks: mine.yaml}]"])
    assert recipe.eval is not None
    assert recipe.eval.judges == [{"kind": "rubric", "checks": [{"name": "short", "kind": "max_words", "value": 9}]}]
    said = refused(recipe_file, "eval.judges=[{kind: rubric, checks: other.yaml}]")
    assert "eval.judges.0.checks" in said
    assert "other.yaml" in said


def test_an_unknown_recipe_names_the_nearest_shipped_one():
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        load_recipe("quickstrat")


def test_order_puts_every_stage_after_its_parents(recipe_file: Path):
    recipe = load_recipe(recipe_file)
    assert order(recipe) == ["sft", "reward", "ppo", "ipo"]
    assert parents(recipe, "ppo") == ["sft", "reward"]
    assert needed_for(recipe, ["ipo"]) == ["sft", "ipo"]
    assert recipe.eval is not None and recipe.eval.policies == ["base", "sft", "ppo", "ipo"]


@pytest.mark.parametrize("file", shipped_recipes(), ids=lambda file: file.stem)
def test_every_shipped_recipe_is_right(file: Path, tmp_path: Path):
    """Every word of it, the fields in `train` included, is one that its config knows."""
    from preftune.eval.judges.registry import plan_judges
    from preftune.models.base import Base
    from preftune.stages.check import stage_problems

    recipe = load_recipe(file.stem)
    assert recipe.name == file.stem
    base = Base("random:llama", tmp_path, None, "")
    for name in order(recipe):
        assert stage_problems(stage_job(recipe, name, base, tmp_path, tmp_path / name)) == []
    assert recipe.eval is not None
    eval_spec(recipe, base, tmp_path)
    plan_judges(recipe.eval.judges, tmp_path)


def test_a_group_stands_for_the_parameters_that_it_holds():
    stage = stage_model(PPO).model_validate(
        {"kind": "ppo", "data": "d", "reward": "r", "kl": {"coef": 1, "in": "loss", "target": 2, "horizon": 3}}
    )
    assert stage.method() == {"kl_coef": 1, "kl_in": "loss", "kl_target": 2, "kl_horizon": 3}
    assert [each.stage for each in stage.rewards] == ["r"]


def test_a_job_holds_what_the_recipe_says(tmp_path: Path):
    from preftune.models.base import Base

    recipe = Recipe.model_validate(
        {
            "name": "t",
            "seed": 3,
            "model": {"base": "random:llama", "dtype": "bfloat16"},
            "lora": {"r": 8, "alpha": 16},
            "data": {"mix": {"sources": [{"path": "a", "weight": 2}, {"path": "b", "limit": 5}], "seed": 9}},
            "stages": {
                "sft": {"kind": "sft", "data": "mix"},
                "dpo": {"kind": "dpo", "from": "sft", "data": "mix", "beta": 0.3, "seed": 4, "lora": {"r": 16}},
            },
        }
    )
    base = Base("random:llama", tmp_path, None, "")
    sft, dpo = (stage_job(recipe, name, base, tmp_path, tmp_path / f".{name}") for name in ("sft", "dpo"))
    assert (sft.parent, sft.seed, sft.dtype, sft.method) == (None, 3, "bfloat16", {})
    assert (dpo.parent, dpo.seed, dpo.method) == (tmp_path / "sft", 4, {"beta": 0.3})
    assert (dpo.lora.r, dpo.lora.alpha) == (16, 16)
    assert [(s.path, s.weight, s.limit) for s in dpo.data.sources] == [("a", 2, None), ("b", 1, 5)]
    assert dpo.data.seed == 9
    assert {f.name for f in dataclasses.fields(data_spec(recipe.data["mix"], 0))} >= {"max_length", "overflow"}


STAGES = """\
name: t
model: {base: "random:llama"}
data: {demos: {path: d.jsonl}, pairs: {path: p.jsonl}}
stages:
"""


def parents_of(tmp_path: Path, *stages: str) -> dict[str, str]:
    file = tmp_path / "t.yaml"
    file.write_text(STAGES + "".join(f"  {each}\n" for each in stages))
    recipe = load_recipe(file)
    assert recipe.resolved()["stages"].keys() == recipe.stages.keys()
    written = {name: stage["from"] for name, stage in recipe.resolved()["stages"].items()}
    assert written == {name: stage.parent for name, stage in recipe.stages.items()}
    return written


def test_a_stage_without_from_starts_from_the_sft_stage(tmp_path: Path):
    chain = ["dpo: {data: pairs}", "warm: {kind: sft, data: demos}", "reward: {data: pairs, from: null}"]
    assert parents_of(tmp_path, *chain) == {"dpo": "warm", "warm": "base", "reward": "warm"}
    assert parents_of(tmp_path, "dpo: {data: pairs, from: base}", chain[1]) == {"dpo": "base", "warm": "base"}
    assert parents_of(tmp_path, "dpo: {data: pairs}") == {"dpo": "base"}


def test_an_sft_stage_that_comes_from_a_stage_is_not_what_that_starts_from(tmp_path: Path):
    after = ["dpo: {data: pairs}", "sft: {data: demos, from: dpo}"]
    assert parents_of(tmp_path, *after) == {"dpo": "base", "sft": "dpo"}
    both = ["sft: {data: demos}", "polish: {kind: sft, data: demos, from: dpo}", "dpo: {data: pairs}"]
    assert parents_of(tmp_path, *both) == {"sft": "base", "polish": "dpo", "dpo": "sft"}


def test_where_the_chain_leaves_a_doubt_the_line_to_write_is_said(tmp_path: Path):
    two = ["one: {kind: sft, data: demos, from: base}", "two: {kind: sft, data: demos, from: base}"]
    with pytest.raises(UserError, match=r"t\.yaml:7: stages\.dpo: .*write from: one or from: two or from: base"):
        parents_of(tmp_path, *two, "dpo: {data: pairs}")
    with pytest.raises(UserError, match=r"stages\.two: .*there is one too; write from: one or from: base"):
        parents_of(tmp_path, two[0], "two: {kind: sft, data: demos}")


def test_all_problems_are_said_at_once_each_with_its_line(tmp_path: Path):
    file = tmp_path / "t.yaml"
    lines = ["sft: {data: demo, from: base}", "reward: {data: pairs, bta: 1}", "dpo: {data: pairs, beta: -1}"]
    lines += ["ppo: {data: pairs, reward: rewrd}", "odd: {data: pairs}"]
    file.write_text(
        "sead: 3\n" + STAGES.replace("data: {", "data: {d: {pth: x}, ") + "".join(f"  {s}\n" for s in lines)
    )
    with pytest.raises(UserErrors) as caught:
        load_recipe(file, ["stages.sft.lora.rank=3"])
    said = str(caught.value).splitlines()
    assert said[0].startswith(f"{file}:10: stages.odd: lacks its kind")
    for place, part in (
        (f"{file}:1: sead", "did you mean 'seed'"),
        (f"{file}:4: data.d.pth", "did you mean 'path'"),
        (f"{file}:7: stages.reward.bta", ""),
        (f"{file}:8: stages.dpo.beta", "at least 0"),
        ("command line (stages.sft.lora.rank=3): stages.sft.lora.rank", "did you mean 'r'"),
    ):
        assert any(line.startswith(place) and part in line for line in said), (place, said)
    # what the names mean is looked at where every stage could be read
    file.write_text(file.read_text().replace("  odd: {data: pairs}\n", "").replace("d: {pth: x}, ", ""))
    with pytest.raises(UserErrors) as caught:
        load_recipe(file)
    said = str(caught.value).splitlines()
    assert any(line.startswith(f"{file}:6: stages.sft.data: no data entry 'demo'") for line in said)
    assert any(line.startswith(f"{file}:9: stages.ppo.reward.0: no stage 'rewrd'") for line in said)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("base=x", "write it in model: {base: ...}"),
        ("learning_rate=1", "stages.NAME.train"),
        ("stages.ipo.lr=1", "write learning_rate in stages.ipo.train"),
        ("stages.ipo.batch_size=1", "write per_device_train_batch_size in stages.ipo.train"),
        ("stages.ipo.epochs=1", "write num_train_epochs in stages.ipo.train"),
        ("stages.ipo.warmup=1", "write warmup_steps in stages.ipo.train"),
        ("gpus=2", "--launch"),
        ("model.r=2", "write it in lora: {r: ...}"),
        ("data.demos.file=x", "did you mean 'path'?"),
        ("stages.ipo.kind=simpo", "kind: dpo with loss_type: sigmoid_norm"),
    ],
)
def test_hints_go_by_meaning(recipe_file: Path, override: str, part: str):
    assert part in refused(recipe_file, override)


BILLIONS = "a: &a [1]\nb: &c0 [*a, *a]\n" + "".join(
    f"c{i}: &c{i} [{', '.join([f'*c{i - 1}'] * 9)}]\n" for i in range(1, 8)
)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (BILLIONS, "aliases"),
        ("a: &a [*a]\n", "itself"),
        ("a: " + "[" * 3000 + "]" * 3000 + "\n", "nested too deeply"),
        ("name: !!binary aGVsbG8=\n", "broken YAML"),
        ("lora: !!set {r, alpha}\n", "broken YAML"),
        ("name: 'a\x00b'\n", "broken YAML"),
    ],
    ids=["billions", "itself", "deep", "binary", "set", "nul"],
)
def test_yaml_that_is_no_recipe_is_refused_at_once(tmp_path: Path, text: str, part: str):
    file = tmp_path / "t.yaml"
    file.write_text(text)
    assert part in refused(file)


@pytest.mark.parametrize("override", ["stages[0]=1", ".=5", "stages..sft=1", "stages.²=1", "stages.ipo.lora[0]=1"])
def test_overrides_that_name_no_key_are_refused(recipe_file: Path, override: str):
    assert refused(recipe_file, override).startswith(f"command line ({override})")


def test_an_override_may_write_a_place_in_a_list_with_brackets(recipe_file: Path):
    recipe = load_recipe(recipe_file, ["eval.judges[0].name=rm"])
    assert recipe.eval is not None and recipe.eval.judges[0]["name"] == "rm"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("stages.ipo.lora={r: 8}", "is 8, below 16 of sft"),
        ("stages.ipo.lora={r: 32}", "use alpha: 64 with r: 32"),
        ("stages.ipo.lora={target_modules: [q_proj]}", "keep the parent's target modules"),
        ("stages.ipo.lora={use_dora: true}", "stages.ipo.lora.use_dora: is true, and false in sft"),
        ("lora.trainable_token_indices=[-1]", "at least 0"),
        ("lora.trainable_token_indices=[]", "at least 1"),
        ("model.add_tokens=['<x>','<x>']", "model.add_tokens: '<x>' stands there twice"),
        ("model.add_tokens=['']", "is no token"),
        ("stages.ipo.lora={rank_pattern: {q_proj: 2}}", "stages.ipo.lora.rank_pattern: is {'q_proj': 2}, and not said"),
        ("stages.ipo.lora={layers_to_transform: 1}", "layers_to_transform: is [1], and not said in sft"),
        ("stages.ipo.lora={target_modules: '.*q_proj'}", "keep the parent's target modules"),
        ("lora.init_lora_weights=eva", "lora.init_lora_weights: eva draws A from activations"),
        ("lora={init_lora_weights: orthogonal, r: 5}", "orthogonal has even ranks, and 5 is odd; use r: 6"),
        ("stages.sft.lora={init_lora_weights: false}", "stages.sft.lora.init_lora_weights: False starts with a random"),
        ("lora.layers_to_transform=-1", "at least 0"),
        ("lora.rank_pattern={q_proj: 0}", "at least 1"),
        ("seed=-1", "at least 0"),
        ("stages.ipo.seed=4294967296", "less than"),
    ],
)
def test_what_a_child_or_a_seed_cannot_be_is_said_with_its_line(recipe_file: Path, override: str, part: str):
    assert part in refused(recipe_file, override)


def test_a_child_keeps_its_parent_s_rows_of_tokens_and_may_have_more(recipe_file: Path):
    words = ["lora.trainable_token_indices=[5]", "stages.ipo.lora={trainable_token_indices: [6]}"]
    assert "leaves out 5, whose rows sft, from which it starts, trains" in refused(recipe_file, *words)
    load_recipe(recipe_file, [words[0], "stages.ipo.lora={trainable_token_indices: [6, 5]}"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("{use_dora: true}", "use_dora: is false, and true in sft"),
        ("{init_lora_weights: pissa}", "r: is 16, below 32 of sft, from which it starts: init_lora_weights: pissa has"),
        ("{alpha_pattern: {q_proj: 2}}", "alpha_pattern: is not said, and {'q_proj': 2.0} in sft"),
    ],
)
def test_a_parent_that_no_child_can_copy_is_said_of_each(recipe_file: Path, override: str, said: str):
    with pytest.raises(UserErrors) as caught:
        load_recipe(recipe_file, [f"stages.sft.lora={override}"])
    for child in ("reward", "ipo"):
        assert f"stages.{child}.lora.{said}" in str(caught.value)


def test_an_adapter_from_outside_the_run_is_a_parent(tmp_path: Path):
    """`from: {adapter: PATH}`, beside the recipe or anywhere: resolved, written out again, and no stage of the run."""
    outside = tmp_path / "mine"
    outside.mkdir()
    (tmp_path / "t.yaml").write_text(
        'name: t\nmodel: {base: "random:llama"}\ndata: {d: {path: d.jsonl}}\n'
        "stages:\n  dpo: {from: {adapter: mine}, data: d}\n"
    )
    with pytest.raises(UserError, match=r"t\.yaml:5: stages\.dpo\.from\.adapter: no adapter in '.*mine'"):
        load_recipe(tmp_path / "t.yaml")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (outside / name).write_bytes(b"")
    recipe = load_recipe(tmp_path / "t.yaml")
    assert recipe.stages["dpo"].imports == outside and parents(recipe, "dpo") == []
    assert recipe.resolved()["stages"]["dpo"]["from"] == {"adapter": str(outside)}
    assert lines_of_descent(recipe) == [f"dpo (from the adapter {outside})"]
    assert stage_job(recipe, "dpo", Base("b", tmp_path, None, ""), tmp_path / "run", tmp_path / "out").parent == outside
    again = tmp_path / "run.yaml"
    again.write_text(yaml.safe_dump(recipe.resolved()))
    assert load_recipe(again).stages["dpo"].imports == outside
    said = {"peft_type": "LORA", "r": 32, "lora_alpha": 64, "use_dora": True}
    (outside / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"stages\.dpo\.lora\.use_dora: is false, and true in .*mine"):
        load_recipe(tmp_path / "t.yaml")
    with pytest.raises(UserError, match=r"stages\.dpo\.lora\.r: is 16, below 32 of .*mine"):
        load_recipe(tmp_path / "t.yaml", ["lora.use_dora=true"])
    load_recipe(tmp_path / "t.yaml", ["lora.use_dora=true", "lora.r=32", "lora.alpha=64"])
    with pytest.raises(UserError, match=r"stages\.dpo\.from: is .*expected a stage's name, base, or \{adapter: PATH\}"):
        load_recipe(tmp_path / "t.yaml", ["stages.dpo.from={folder: mine}"])
