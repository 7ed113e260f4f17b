"""What a recipe's `reward:` may say, what of it counts for the cache, and what is refused before anything trains."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from preftune.cli.keys import Keys
from preftune.cli.validate import DataCheck, check_settings, data_uses
from preftune.errors import UserError
from preftune.models.loading import resolve_base
from preftune.recipes.build import reward_sources
from preftune.recipes.graph import lines_of_descent, order
from preftune.recipes.json_schema import recipe_schema
from preftune.recipes.load import load_recipe

RECIPE = """\
name: t
model: {base: "random:llama", dtype: float32}
lora: {r: 4, alpha: 8}
data:
  demos: {path: demos.jsonl}
  pairs: {path: pairs.jsonl}
  sums: {path: sums.jsonl}
stages:
  sft: {data: demos}
  reward: {data: pairs}
  ppo: {data: sums, rollout_batch_size: 4, num_mini_batches: 2, reward: REWARD}
eval: {prompts: sums, max_new_tokens: 4, judges: JUDGES}
"""
NUMERIC = {"kind": "verifier", "check": "numeric", "column": "answer"}
RUBRIC = {"kind": "rubric", "checks": "style.yaml"}
SERVER = {"kind": "http", "url": "http://127.0.0.1:9/score"}
ENDPOINT = {"kind": "endpoint", "url": "http://127.0.0.1:9/v1", "model": "m"}
SECRET = "sk-abcdefghijklmnop0123456789"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    demos = [{"prompt": f"{i}?", "completion": str(i)} for i in range(12)]
    pairs = [{"prompt": f"{i}?", "chosen": str(i), "rejected": "no"} for i in range(12)]
    sums = [{"prompt": f"{i} + 1?", "answer": i + 1, "note": f"it is {i + 1}"} for i in range(12)]
    for name, rows in (("demos", demos), ("pairs", pairs), ("sums", sums)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "style.yaml").write_text("- {kind: max_words, value: 3}\n")
    (tmp_path / "shape.json").write_text('{\n\t"type": "object", "required": ["a"]}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "judge.txt").write_text("Say whether it is {note}.\n")
    return tmp_path


def recipe(folder: Path, reward: Any, judges: Any = ()) -> Any:
    text = RECIPE.replace("REWARD", json.dumps(reward)).replace("JUDGES", json.dumps(list(judges)))
    (folder / "t.yaml").write_text(text)
    return load_recipe(folder / "t.yaml")


def sources(folder: Path, reward: Any) -> list[Any]:
    return list(reward_sources(recipe(folder, reward).stages["ppo"], Path("/run")))


def refused(folder: Path, reward: Any) -> str:
    with pytest.raises(UserError) as error:
        recipe(folder, reward)
    return str(error.value)


def test_what_was_said_before_means_what_it_meant(folder: Path):
    made = sources(folder, ["reward", {"stage": "reward", "weight": 2}, {"model": "x/y"}, {"function": "m:f"}])
    kinds = [(each.kind, each.target, each.weight) for each in made]
    assert kinds == [("stage", "/run/reward", 1.0), ("stage", "/run/reward", 2.0), ("model", "x/y", 1.0),
                     ("function", "m:f", 1.0)]  # fmt: skip
    assert all(each.on_failure == "stop" and not each.settings for each in made)


def test_judges_words_are_sources(folder: Path):
    given = [
        {**NUMERIC, "weight": 0.5, "on_failure": 0, "name": "sum"}, RUBRIC, {**SERVER, "on_failure": "skip"}, ENDPOINT,
        {"kind": "reward", "stage": "reward"}, {"kind": "model", "model": "x/y", "batch_size": 2},
        {"kind": "function", "function": "m:f"},
    ]  # fmt: skip
    made = sources(folder, given)
    kinds = ["verifier", "rubric", "http", "endpoint", "stage", "model", "function"]
    assert [each.kind for each in made] == kinds
    assert made[0].name == "sum" and made[0].weight == 0.5 and made[0].on_failure == 0
    assert made[0].settings == {"check": "numeric", "column": "answer"} and made[0].run_dir == Path("/run")
    assert made[1].settings == {"checks": [{"kind": "max_words", "value": 3}]} and made[2].on_failure == "skip"
    assert made[5].settings == {"batch_size": 2}


def test_one_source_may_stand_alone(folder: Path):
    (made,) = sources(folder, NUMERIC)
    assert made.kind == "verifier" and made.name == "numeric"
    assert "ppo (from sft, rewards: numeric)" in lines_of_descent(recipe(folder, NUMERIC))


def test_files_are_read_with_the_recipe_and_a_run_keeps_what_they_said(folder: Path):
    given = [RUBRIC, {"kind": "verifier", "check": "json", "schema": "shape.json"}, {**ENDPOINT, "prompt": "judge.txt"}]
    loaded = recipe(folder, given, judges=[{**ENDPOINT, "prompt": "judge.txt", "mode": "score"}])
    for name in ("style.yaml", "shape.json", "judge.txt"):
        (folder / name).unlink()
    (folder / "again.yaml").write_text(loaded.text())
    again = load_recipe(folder / "again.yaml")
    assert again.resolved() == loaded.resolved()
    rewards = again.stages["ppo"].rewards
    assert again.eval is not None
    assert rewards[0].settings()["checks"] == [{"kind": "max_words", "value": 3}]
    assert rewards[1].settings()["schema"] == {"type": "object", "required": ["a"]}
    assert rewards[2].settings()["prompt"] == "Say whether it is {note}.\n" == again.eval.judges[0]["prompt"]


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ({}, "reward.0: names nothing, expected one of stage, model, function, or a kind"),
        ({"weight": 1}, "names nothing"),
        ({"stage": "reward", "model": "x/y"}, "names stage and model, expected one of"),
        ({"kind": "verifer"}, "reward.0.kind: is 'verifer', expected one of reward, model"),
        ({"kind": "verifer"}, "did you mean 'verifier'?"),
        ({"kind": "human"}, "people compare replies, and a reward scores one"),
        ({**NUMERIC, "url": "http://h"}, "reward.0.url: a verifier source takes no 'url'"),
        ({**SERVER, "model": "m"}, "reward.0.model: a http source takes no 'model'"),
        ({"kind": "reward"}, "a stage or an adapter folder, not both"),
        ({"kind": "reward", "stage": "reward", "adapter": "x"}, "a stage or an adapter folder, not both"),
        ({"kind": "reward", "stage": "sft"}, "stage 'sft' is of kind sft, expected a reward stage"),
        ({"kind": "model"}, "names no model"),
        ({"kind": "function", "function": "f"}, "is 'f', expected module:function"),
        ({"chekcs": []}, "reward.0.chekcs: 'chekcs' is no key of a source of scores"),
        ({"stage": "reward", "wait": 2}, "reward.0.wait"),
        ({**NUMERIC, "on_failure": "ignore"}, "on_failure: is 'ignore', expected"),
        ({**NUMERIC, "weight": "much"}, "weight: is 'much', expected a number"),
        ({**RUBRIC, "checks": "none.yaml"}, "reward.checks: no file 'none.yaml'"),
        ([{**ENDPOINT, "prompt": "none.txt"}], "reward.0.prompt: no file 'none.txt'"),
        ({"kind": "verifier", "check": "json", "schema": "none.json"}, "reward.schema: no file 'none.json'"),
        ({"kind": "verifier", "check": "json", "schema": "broken.json"}, "broken.json: is no JSON"),
    ],
)
def test_what_is_refused_when_the_recipe_is_read(folder: Path, reward: Any, said: str):
    found = refused(folder, reward)
    assert said in found and ("t.yaml:" in found or "broken.json" in said) and "\n" not in found


@pytest.mark.parametrize(
    "extra", [{"api_key": "x1"}, {"parameters": {"token": "abc"}}, {"prompt": f"use {SECRET} and say"}]
)
def test_keys_have_no_place_in_it(folder: Path, extra: dict[str, Any]):
    found = refused(folder, [{**ENDPOINT, **extra}])
    assert "holds a key or a password" in found and "api_key_env" in found and SECRET not in found
    (folder / "judge.txt").write_text(f"Ask with {SECRET}.\n")
    found = refused(folder, [{**ENDPOINT, "prompt": "judge.txt"}])
    assert "holds a key or a password" in found and SECRET not in found


def check(folder: Path, reward: Any, judges: Any = ()) -> None:
    loaded = recipe(folder, reward, judges)
    check_settings(loaded, resolve_base("random:llama"), order(loaded), folder / "run")


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ({"kind": "verifier"}, r"stages\.ppo\.reward\.0\.check: is missing"),
        ({**NUMERIC, "tolerance": -1}, r"stages\.ppo\.reward\.0\.tolerance: is -1"),
        ({"kind": "rubric", "checks": []}, r"stages\.ppo\.reward\.0: checks is \[\]"),
        ({"kind": "verifier", "check": "json", "schema": {"format": "date"}}, r"reward\.0\.schema\.format: is no word"),
        ({**SERVER, "format": "trl"}, r"stages\.ppo\.reward\.0\.format: is 'trl'"),
        ({**SERVER, "url": "h"}, r"stages\.ppo\.reward\.0\.url: is 'h'"),
        ({**ENDPOINT, "mode": "pairwise"}, r"stages\.ppo\.reward\.0\.mode: is 'pairwise'"),
        ({**ENDPOINT, "api_key_env": "NO_KEY"}, r"api_key_env: \$NO_KEY is not set"),
        ({"kind": "model", "model": "./none", "batch_size": 0}, r"reward\.0\.batch_size: is 0"),
        ({"kind": "function", "function": "no_such:f"}, r"stages\.ppo\.reward\.0: no_such:f cannot be imported"),
    ],
)
def test_what_is_found_before_anything_trains(folder: Path, reward: Any, said: str):
    with pytest.raises(UserError, match=said):
        check(folder, reward)


def test_what_is_right_passes_and_so_do_the_same_judges(folder: Path):
    given = [NUMERIC, RUBRIC, SERVER, ENDPOINT]
    judges = [{**NUMERIC, "name": "a"}, {**RUBRIC, "name": "b"}, {**SERVER, "name": "c"}, {**ENDPOINT, "name": "d"}]
    check(folder, given, judges)


def check_data(folder: Path, reward: Any, judges: Any = ()) -> None:
    loaded = recipe(folder, reward, judges)
    data = DataCheck(loaded, None, None)
    for use in data_uses(loaded):
        list(data.rows(*use))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({**NUMERIC, "column": "anser"}, "reads the column 'anser', and no row has it; did you mean 'answer'?"),
        ({**NUMERIC, "column": "some"}, "reads the column 'some', and not every row has it"),
        (
            {**NUMERIC, "column": "word"},
            r"sums\.jsonl:1: the answer to compare with is 'w0', expected a number, and 12",
        ),
        ({**SERVER, "format": "verl", "column": "truth"}, "reads the column 'truth', and no row has it"),
        ({**ENDPOINT, "mode": "score", "criteria_column": "rubric"}, "reads the column 'rubric', and no row has it"),
    ],
)
def test_columns_and_answers_are_looked_at_in_the_data(folder: Path, entry: dict[str, Any], said: str):
    rows = [{"prompt": f"{i}?", "answer": i, "word": f"w{i}", **({"some": i} if i else {})} for i in range(13)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=rf"stages\.ppo\.reward\.0: .*{said}"):
        check_data(folder, entry)
    check_data(folder, {**entry, "on_failure": 0})
    with pytest.raises(UserError, match=rf"eval\.judges\[0\]: .*{said}"):
        check_data(folder, NUMERIC, [entry])
    check_data(folder, NUMERIC, [NUMERIC])


def key(folder: Path, reward: Any) -> dict[str, Any]:
    loaded = recipe(folder, reward)
    keys = Keys(loaded, resolve_base("random:llama"), folder / "run")
    return keys.stage("ppo", {"sft": "s", "reward": "r"})


@pytest.mark.checklist("W17")
def test_w17_what_scores_depend_on_is_in_the_stages_key(folder: Path):
    before = key(folder, [RUBRIC, NUMERIC, ENDPOINT, {**SERVER}])
    assert before["reward.0.checks"] == [{"kind": "max_words", "value": 3}] and before["reward.1.column"] == "answer"
    (folder / "style.yaml").write_text("- {kind: max_words, value: 4}\n")
    changed = key(folder, [RUBRIC, NUMERIC, {**ENDPOINT, "criteria": "how brief"}, {**SERVER, "on_failure": 0}])
    assert {name for name in {**before, **changed} if before.get(name) != changed.get(name)} == {
        "reward.0.checks", "reward.2.criteria", "reward.3.on_failure",
    }  # fmt: skip


@pytest.mark.checklist("W17")
def test_w17_how_a_server_is_asked_is_not(folder: Path):
    patient = {"retries": 9, "concurrency": 2, "timeout": 9, "cache": "kept"}
    assert key(folder, {**SERVER, **patient, "batch_size": 4}) == key(folder, SERVER)
    priced = {**ENDPOINT, **patient, "price_per_million": {"input": 1, "output": 2}}
    assert key(folder, priced) == key(folder, ENDPOINT)


def test_older_sources_have_the_parts_that_they_had(folder: Path):
    parts = key(folder, [{"function": "json:dumps"}, {"stage": "reward"}])
    said = {name: value for name, value in parts.items() if name.startswith("reward.")}
    assert said == {"reward.0.function": "json:dumps", "reward.0.weight": 1.0, "reward.1.stage": "reward",
                    "reward.1.weight": 1.0}  # fmt: skip
    assert parts["code of json:dumps"] is not None


def test_an_adapter_from_outside_counts_by_its_files(folder: Path):
    (folder / "rm").mkdir()
    entry = {"kind": "reward", "adapter": "rm"}
    (source,) = sources(folder, entry)
    assert (source.kind, source.target) == ("stage", str(folder / "rm"))
    before = key(folder, entry)
    assert f"files of {folder / 'rm'}" in before


def test_editors_know_the_fields_and_nothing_else():
    reward = recipe_schema()["$defs"]["Reward"]
    assert reward["additionalProperties"] is False
    assert {"check", "checks", "url", "criteria_column", "on_failure", "column"} <= reward["properties"].keys()
    assert "votes" not in reward["properties"] and all(
        each.get("description") for each in reward["properties"].values()
    )
    assert yaml.safe_dump(reward["properties"]["kind"]["enum"]).count("- ") == 7
