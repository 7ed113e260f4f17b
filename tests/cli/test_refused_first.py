"""What the last stage, a judge or a function would be refused for is said before the first stage trains."""

import json
from pathlib import Path

import pytest

from preftune.cli import main as cli

PAIR = {"prompt": "Hello?", "chosen": "Hi there.", "rejected": "Go away."}
RECIPE = """\
name: t
model: {base: "random:llama", dtype: float32}
lora: {r: 4, alpha: 8}
data:
  pairs: {path: pairs.jsonl}
stages:
  sft: {data: pairs, train: {max_steps: 1, per_device_train_batch_size: 2}}
  dpo: {data: pairs, train: {max_steps: 1, per_device_train_batch_size: 2}}
  ppo: {data: pairs, reward: {function: "rewards_of_mine:score"}, rollout_batch_size: 2, total_episodes: 2,
        num_ppo_epochs: 1, max_new_tokens: 4}
eval:
  prompts: pairs
  judges: [{kind: rubric, checks: [{kind: max_words, value: 3}]}]
"""
REWARDS = "def score(prompts, completions):\n    lengths = [len(each) for each in completions]\n    return lengths\n"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pairs.jsonl").write_text((json.dumps(PAIR) + "\n") * 4)
    (tmp_path / "rewards_of_mine.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "rewards_of_mine", raising=False)
    file = tmp_path / "t.yaml"
    file.write_text(RECIPE)
    return file


def states(run: Path) -> dict[str, str]:
    file = run / "run.json"
    return {k: v["state"] for k, v in json.loads(file.read_text())["stages"].items()} if file.is_file() else {}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.ppo.total_episodes=3", r"stages\.ppo\.total_episodes: .*expected a multiple of rollout_batch_size"),
        ("stages.dpo.train.optim=magic", r"stages\.dpo\.train\.optim: magic"),
        (
            "stages.ppo.reward.function=no_such_module:f",
            r"stages\.ppo\.reward\[?\.?0\]?: no_such_module:f cannot be imp",
        ),
        ("eval.judges.0.checks.0.kind=max_wordz", r"eval\.judges\[0\]\.checks\[0\]"),
        ("lora.target_modules=[nope_proj]", r"lora\.target_modules"),
    ],
)
def test_nothing_trains_before_the_last_stage_is_looked_at(shell, recipe: Path, override: str, said: str):
    run = recipe.parent / "run"
    shell.refused("run", recipe, override, "--output-dir", run, said=said)
    assert not states(run)
    shell.refused("validate", recipe, override, said=said)


def test_several_mistakes_are_several_lines_with_their_places(shell, recipe: Path):
    wrong = ("stages.ppo.total_episodes=3", "stages.dpo.train.learning_rate=-1")
    code, _, err = shell("validate", recipe, *wrong)
    lines = err.strip().splitlines()
    assert code == 2 and len(lines) == 2, err
    assert any(line.startswith(f"command line ({wrong[0]}): stages.ppo.total_episodes") for line in lines)
    assert any(line.startswith(f"command line ({wrong[1]}): stages.dpo.train.learning_rate: is -1") for line in lines)


def test_validate_shows_what_each_stage_starts_from(shell, recipe: Path):
    code, out, _ = shell("validate", recipe)
    assert code == 0
    assert "sft (from base), dpo (from sft), ppo (from sft, rewards: rewards_of_mine:score)" in out
    code, out, _ = shell("validate", recipe, "stages.dpo.from=base", "stages.ppo.from=base")
    assert code == 0 and "nothing uses sft" in out


def test_a_function_that_raises_shows_its_own_line(shell, recipe: Path):
    (recipe.parent / "rewards_of_mine.py").write_text(
        "def score(prompts, completions):\n    return inner(completions)\n\n\n"
        "def inner(completions):\n    raise LookupError('no such word')\n"
    )
    only = ("--only", "ppo", "stages.ppo.from=base", "--output-dir", recipe.parent / "run")
    where = r"rewards_of_mine\.py:6 in inner: LookupError: no such word"
    shell.refused("run", recipe, *only, said=where)


def test_many_bad_rows_are_one_line_of_a_run_and_a_list_of_validate(recipe: Path, capfd: pytest.CaptureFixture[str]):
    rows = [json.dumps(PAIR), *[json.dumps({"prompt": "Hello?", "chosen": "Hi."})] * 3]
    (recipe.parent / "pairs.jsonl").write_text("".join(row + "\n" for row in rows))
    run = recipe.parent / "run"
    assert cli.run_command(["run", str(recipe), "--output-dir", str(run)]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "pairs.jsonl:2: " in lines[0] and "3 of 4 rows have a problem" in lines[0]
    assert not states(run)
    assert cli.run_command(["validate", str(recipe)]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert [line for number in (2, 3, 4) for line in lines if f"pairs.jsonl:{number}: " in line] and len(lines) >= 4
