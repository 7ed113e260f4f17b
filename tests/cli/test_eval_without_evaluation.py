"""`preftune eval kl | perplexity | reward` on a run whose recipe has no `eval:`."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest


def rows(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_kl_takes_prompts_from_data_and_the_sft_stage_as_reference(run, shell):
    code, out, err = shell("eval", "kl", run, "--data", run / "prompts.jsonl", "--json")
    assert code == 0, err
    found = {row["policy"]: row for row in rows(out)}
    assert list(found) == ["base", "sft", "dpo", "ipo"]
    assert all(row["reference"] == "sft" and row["n"] == 4 for row in found.values())
    assert found["sft"]["kl"] == 0 < found["dpo"]["kl"]
    code, out, _ = shell("eval", "kl", run, "--data", "demos", "--policies", "dpo", "--json")
    assert (code, [row["policy"] for row in rows(out)]) == (0, ["dpo", "sft"])
    shell.refused("eval", "kl", run, said="no evaluation; .* need only --data")


def test_kl_between_any_two_policies_of_any_two_runs(run, shell, tmp_path):
    other = Path(shutil.copytree(run, tmp_path / "other"))
    told = ("--data", run / "prompts.jsonl", "--json")
    code, out, err = shell("eval", "kl", run / "dpo", "--reference", other / "ipo", *told)
    assert code == 0, err
    (found,) = rows(out)
    assert (found["policy"], found["reference"], found["n"]) == ("dpo", str(other / "ipo"), 4) and found["kl"] > 0
    # the same as with both in one run, and nothing where both are one
    code, out, _ = shell("eval", "kl", run, "--policies", "dpo", "--reference", "ipo", *told)
    assert (code, [row["kl"] for row in rows(out)]) == (0, [found["kl"]])
    code, out, _ = shell("eval", "kl", run / "dpo", "--reference", other / "dpo", *told)
    assert (code, [row["kl"] for row in rows(out)]) == (0, [0])
    refused = partial(shell.refused, "eval", "kl", run / "dpo", *told, "--reference")
    refused("dpoo", said="no policy and no folder 'dpoo'; did you mean 'dpo'")
    config = json.loads((other / "ipo" / "adapter_config.json").read_text())
    (other / "ipo" / "adapter_config.json").write_text(json.dumps({**config, "task_type": "SEQ_CLS"}))
    refused(other / "ipo", said="is a reward model, expected a policy")
    shell.refused("eval", "kl", run / "dpo", "--policies", "ipo", said="stands beside")


def test_perplexity_and_reward_need_no_evaluation(run, shell):
    code, out, err = shell("eval", "perplexity", run, "--data", run / "demos.jsonl", "--json")
    assert code == 0, err
    assert [row["policy"] for row in rows(out)] == ["base", "sft", "dpo", "ipo"]
    # the adapters were made without a lineage, so that an implicit reward's beta is unknown
    shell.refused("eval", "reward", run, "--stage", "dpo", "--data", run / "pairs.jsonl", said="its beta is unknown")


@pytest.mark.parametrize("command", ["run", "winrate"])
def test_what_needs_one_says_so(run, shell, command):
    shell.refused("eval", command, run, said="its recipe has no evaluation; add eval:")
