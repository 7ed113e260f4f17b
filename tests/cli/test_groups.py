"""GRPO and RLOO in a recipe, rewarded by a Python function: checked, planned, trained, reported, looked at, cached."""

import json
from pathlib import Path

import pytest

from .conftest import Shell

RECIPE = """\
name: groups
model: {base: "random:llama", dtype: float32}
lora: {r: 4, alpha: 8}
data:
  demos:   {path: demos.jsonl}
  prompts: {path: prompts.jsonl}
stages:
  sft:  {data: demos, train: {max_steps: 2, per_device_train_batch_size: 4}}
  grpo: {data: prompts, reward: [{function: "group_rewards:brief"}, {function: "group_rewards:vowels", weight: 0.5}],
         num_generations: 4, rollout_batch_size: 8, total_episodes: 16, max_new_tokens: 8, num_mini_batches: 2}
  rloo: {data: prompts, reward: {function: "group_rewards:brief"}, num_generations: 4, rollout_batch_size: 8,
         total_episodes: 16, max_new_tokens: 8}
eval:
  prompts: {path: prompts.jsonl, limit: 4}
  policies: [sft, grpo, rloo]
  reference: sft
  max_new_tokens: 6
  judges: [{kind: rubric, checks: [{kind: max_words, value: 2}]}]
"""
REWARDS = """\
def brief(completions, **columns): return [-len(said[-1]["content"]) / 10 for said in completions]
def vowels(completions, **columns): return [float(said[-1]["content"].count("e")) for said in completions]
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    demos = [{"prompt": f"Question {i}?", "completion": f"Good {i}."} for i in range(8)]
    (tmp_path / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in demos))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in demos))
    (tmp_path / "group_rewards.py").write_text(REWARDS)
    (tmp_path / "groups.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "groups.yaml"


def test_a_chain_with_groups(recipe: Path, shell: Shell, caplog: pytest.LogCaptureFixture) -> None:
    run = recipe.parent / "runs" / "groups"
    code, _, err = shell("run", recipe)
    assert code == 0, err
    for stage in ("grpo", "rloo"):
        metrics = json.loads((run / stage / "metrics.json").read_text())
        assert metrics["episodes"] == 16 and 0 <= metrics["frac_reward_zero_std"] <= 1
        lineage = json.loads((run / stage / "lineage.json").read_text())
        assert lineage["kind"] == stage and [each["stage"] for each in lineage["parents"]] == ["sft"]
        assert (run / stage / "adapter_model.safetensors").is_file()
    log = [json.loads(line) for line in (run / "grpo" / "log.jsonl").read_text().splitlines()]
    assert {"rewards/brief/mean", "rewards/vowels/mean"} <= log[0].keys()
    assert "grpo: beta is 0.04, which the recipe does not say" in caplog.text
    page = (run / "report.html").read_text()
    assert "Groups without a difference in score" in page and "KL to the reference" in page
    for command in (("doctor", run), ("status", run), ("plan", recipe), ("validate", recipe)):
        code, _, err = shell(*command)
        assert code in (0, 1) and "Traceback" not in err, command
    # nothing runs again
    before = (run / "grpo" / "adapter_model.safetensors").stat().st_mtime_ns
    assert shell("run", recipe)[0] == 0
    assert (run / "grpo" / "adapter_model.safetensors").stat().st_mtime_ns == before
    # each alone, without a reference
    assert shell("grpo", recipe, "stages.grpo.beta=0")[0] == 0
    log = [json.loads(line) for line in (run / "grpo" / "log.jsonl").read_text().splitlines()]
    assert "objective/kl" not in log[0] and "reward" in log[0]
    assert shell("doctor", run)[0] in (0, 1)
