"""`preftune eval` on a tiny run of every stage that orders pairs: its rows, its files, what changes its key."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from preftune.cli import main as cli
from preftune.cli.chain import Chain, Done, Options
from preftune.cli.keys import Keys, difference, eval_needs, key_of
from preftune.cli.output import Output
from preftune.models.base import Base
from preftune.models.lora import WEIGHTS
from preftune.recipes.build import eval_spec
from preftune.recipes.load import load_recipe

# One batch for all that is held out: TRL then logs the plain mean over it.
TRAIN = "train: {max_steps: 6, per_device_train_batch_size: 8, per_device_eval_batch_size: 64, learning_rate: 5e-3}"
RECIPE = f"""\
name: t
model: {{base: "random:llama", dtype: float32}}
lora: {{r: 4, alpha: 8}}
data:
  demos: {{path: pairs.jsonl, limit: 8}}
  pairs: {{path: pairs.jsonl, held_out: 0.4}}
  all: {{path: pairs.jsonl}}
  labels: {{path: labels.jsonl, held_out: 0.4}}
stages:
  sft: {{data: demos, {TRAIN}}}
  reward: {{from: sft, data: pairs, {TRAIN}}}
  dpo: {{from: sft, data: pairs, beta: 0.3, {TRAIN}}}
  ipo: {{kind: dpo, from: sft, data: pairs, loss_type: ipo, ld_alpha: 0.5, {TRAIN}}}
  kto: {{from: base, data: pairs, beta: 0.2, {TRAIN}}}
  unheld: {{kind: dpo, from: sft, data: all, {TRAIN}}}
  labelled: {{kind: kto, from: sft, data: labels, {TRAIN}}}
eval: {{prompts: {{path: pairs.jsonl, limit: 4}}, policies: [sft, dpo], reference: sft, max_new_tokens: 4}}
"""
ORDERED = ["reward", "dpo", "ipo", "kto", "unheld"]


def write(folder: Path) -> Path:
    """The recipe and its data."""
    pairs = [
        {"prompt": f"say {place}", "chosen": "ab" * (place % 4 + 1), "rejected": "z" * (place % 5 + 1)}
        for place in range(40)
    ]
    labels = [{"prompt": row["prompt"], "completion": row["chosen"], "label": place % 2 == 0}
              for place, row in enumerate(pairs)]  # fmt: skip
    for name, rows in (("pairs", pairs), ("labels", labels)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "t.yaml").write_text(RECIPE)
    return folder / "t.yaml"


def chain(recipe: Path, run: Path, *overrides: str) -> dict[str, str]:
    """step -> ran or skipped"""
    done: list[Done] = Chain(load_recipe(recipe, overrides), Options(output_dir=run), Output(json=True)).run()
    return {each.name: each.state for each in done}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    chain(write(folder), folder / "run")
    return folder / "run"


def preftune(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.run_command([str(each) for each in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def rows_of(out: str) -> dict[str, dict[str, Any]]:
    return {row["stage"]: row for row in map(json.loads, out.splitlines())}


def metrics(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "metrics.json").read_text())


def test_every_stage_is_measured_as_its_own_training_counts(run: Path, capsys):
    code, out, err = preftune(capsys, "eval", "reward", run, "--json")
    rows = rows_of(out)
    assert code == 0 and list(rows) == ORDERED
    assert "eval labelled: its reward is left out" in err and "no chosen" in err
    held = metrics(run, "reward")["held_out_pairs"]
    assert {name: row["n"] for name, row in rows.items()} == dict.fromkeys(ORDERED, held) | {"unheld": 40}
    assert [row["held_out"] for row in rows.values()] == [True, True, True, True, False]
    assert [row.get("beta") for row in rows.values()] == [None, 0.3, 0.1, 0.2, 0.1]
    assert [row["kind"] for row in rows.values()] == ["reward", *["implicit"] * 4]
    assert all(sum(each["n"] for each in row["calibration"]) == row["n"] for row in rows.values())
    assert rows["reward"]["accuracy"] == pytest.approx(metrics(run, "reward")["held_out_accuracy"])
    assert rows["reward"]["longer_wins"] == pytest.approx(metrics(run, "reward")["held_out_longer_wins"])
    # what TRL logged on the very same pairs at the end of training
    for stage in ("dpo", "ipo", "kto"):
        logged = metrics(run, stage)
        assert abs(logged["eval_rewards/margins"]) > 0.01
        assert rows[stage]["margin_mean"] == pytest.approx(logged["eval_rewards/margins"], abs=1e-4)
    wins = rows["dpo"]["accuracy"] * held - 0.5 * rows["dpo"]["ties"]
    assert wins / held == pytest.approx(metrics(run, "dpo")["eval_rewards/accuracies"])


def test_the_chain_writes_those_with_pairs_left_out(run: Path, capsys):
    written = json.loads((run / "eval" / "rewards.json").read_text())
    assert [row["stage"] for row in written] == ["reward", "dpo", "ipo", "kto"]
    _, out, _ = preftune(capsys, "eval", "reward", run, "--json")
    assert written == [row for row in rows_of(out).values() if row["held_out"]]
    results = json.loads((run / "eval" / "results.json").read_text())
    assert all(row["length_se"] is not None and 0 <= row["repetition"] < 1 for row in results)


def test_one_stage_other_pairs_and_tables(run: Path, capsys):
    code, out, _ = preftune(capsys, "eval", "reward", run, "--stage", "ipo", "--data", "all", "--json")
    (row,) = rows_of(out).values()
    assert (code, row["stage"], row["n"], row["held_out"]) == (0, "ipo", 40, False)
    code, out, _ = preftune(capsys, "eval", "reward", run, "--stage", "dpo")
    assert code == 0 and "implicit" in out and "calibration_error" in out and "confidence" not in out
    for stage, said, lines in (
        # every row is wrong: a line that counts them, the first twenty, and how many more
        ("labelled", "no chosen", 22),
        ("dpp", "did you mean 'dpo'", 1),
        ("sft", "no reward, DPO or", 1),
    ):
        code, _, err = preftune(capsys, "eval", "reward", run, "--stage", stage)
        assert code == 2 and said in err and len(err.strip().splitlines()) == lines, err


def test_a_part_of_the_run_is_enough(run: Path, tmp_path: Path, capsys):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    for name in ("sft", "kto", "eval"):
        shutil.rmtree(copy / name)
    code, out, err = preftune(capsys, "eval", "reward", copy, "--json")
    # dpo's reference has gone; the reward model needs none
    assert code == 0 and list(rows_of(out)) == ["reward"]
    assert "eval dpo: its reward is left out" in err
    shutil.copytree(run / "sft", copy / "sft")
    code, out, err = preftune(capsys, "eval", "run", copy)
    assert code == 0 and "kto: its reward is left out" in err
    written = json.loads((copy / "eval" / "rewards.json").read_text())
    assert [row["stage"] for row in written] == ["reward", "dpo", "ipo"]
    assert "replies: length in tokens" in out and "reward models on the pairs" in out
    # others than the recipe's policies are measured without any reward model
    code, out, err = preftune(capsys, "eval", "winrate", copy, "--policies", "ipo", "--json")
    assert code == 0 and "reward" not in err


def test_a_parent_trained_again_is_no_reference(run: Path, tmp_path: Path, capsys):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    tensors = load_file(copy / "sft" / WEIGHTS)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, copy / "sft" / WEIGHTS, {"format": "pt"})
    code, _, err = preftune(capsys, "eval", "reward", copy, "--stage", "dpo")
    assert code == 2 and "did not start from what lies in" in err


def test_the_evaluation_needs_what_it_measures(run: Path):
    recipe = load_recipe(run.parent / "t.yaml")
    assert eval_needs(recipe) == ["sft", "dpo", "reward", "ipo", "kto", "labelled"]
    base = Base("random:llama", run, None, "b" * 64)
    spec = eval_spec(recipe, base, run, ["sft"])
    assert {each.stage: each.parent for each in spec.reward_models} == {
        "reward": None, "dpo": run / "sft", "ipo": run / "sft", "kto": None, "labelled": run / "sft"
    }  # fmt: skip
    none = load_recipe(run.parent / "t.yaml", ("data.pairs.held_out=0", "data.labels.held_out=0"))
    assert eval_needs(none) == ["sft", "dpo"] and eval_spec(none, base, run).reward_models == ()


def eval_parts(recipe: Path, run: Path, judge: str) -> dict[str, Any]:
    loaded = load_recipe(recipe, (f"eval.judges=[{judge}]",))
    keys = Keys(loaded, Base("random:llama", run, None, "b" * 64), run)
    return keys.evaluation(dict.fromkeys(loaded.stages, "k"))


def test_what_a_judge_names_is_part_of_the_key(tmp_path: Path):
    recipe, run = write(tmp_path), tmp_path / "run"
    model = tmp_path / "judge"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"1")
    (model / "README.md").write_text("a judge")
    (tmp_path / "votes.jsonl").write_text("{}\n")
    for judge, file in (
        ("{kind: model, model: judge}", model / "model.safetensors"),
        ("{kind: human, votes: votes.jsonl}", tmp_path / "votes.jsonl"),
    ):
        before = eval_parts(recipe, run, judge)
        assert key_of(eval_parts(recipe, run, judge)) == key_of(before)
        file.write_bytes(b"22")
        after = eval_parts(recipe, run, judge)
        assert key_of(after) != key_of(before)
        assert difference(before, after) == f"files of {file.parent if file.parent == model else file}"
    # what no model reads changes nothing
    before = eval_parts(recipe, run, "{kind: model, model: judge}")
    (model / "README.md").write_text("another")
    assert eval_parts(recipe, run, "{kind: model, model: judge}") == before
    # a model that rewards PPO is one too
    extra = "stages.ppo={from: sft, data: demos, reward: {model: %s}}"
    loaded = [load_recipe(recipe, (extra % each,)) for each in (model, "owner/name")]
    keys = [Keys(each, Base("random:llama", run, None, "b" * 64), run).stage("ppo", {"sft": "k"}) for each in loaded]
    assert [f"files of {model}" in each for each in keys] == [True, False]
    # a hub id says by itself which model it is
    assert not [name for name in eval_parts(recipe, run, "{kind: model, model: owner/name}") if "files of" in name]
