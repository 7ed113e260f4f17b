"""Judges that are no strangers to what they judge."""

from pathlib import Path
from typing import Any

import pytest

from preftune.eval.judges.self_preference import self_judged, self_preference


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ({"kind": "reward", "stage": "reward"}, "own reward model: the policies of ppo were trained to please it"),
        ({"kind": "reward", "adapter": "runs/x/other"}, "one of this run's own models (other)"),
        ({"kind": "reward", "adapter": "elsewhere/reward"}, None),
        ({"kind": "endpoint", "model": "owner/Small-Model-1B"}, "is the base of these policies (hub/small-model-1b)"),
        ({"kind": "endpoint", "model": "small-model-1b:latest"}, "is the base of these policies"),
        ({"kind": "endpoint", "model": "dpo"}, "one of this run's own models (dpo)"),
        ({"kind": "endpoint", "model": "/srv/x/dpo"}, "one of this run's own models (dpo)"),
        ({"kind": "endpoint", "model": "big-model"}, None),
        ({"kind": "model", "model": "dpo"}, "one of this run's own models (dpo)"),
        ({"kind": "rubric", "checks": []}, None),
    ],
)
def test_own_models_and_the_base_are_named(tmp_path, monkeypatch, judge, said):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    stages = ["sft", "reward", "other", "dpo", "ppo"]
    pleasing = ["ppo"] if judge.get("stage") == "reward" else []
    found = self_preference(judge, base="hub/small-model-1b", stages=stages, pleasing=pleasing, run_dir=run)
    assert (found is None) == (said is None)
    assert said is None or (found is not None and said in found)


NUMERIC = {"kind": "verifier", "check": "numeric", "column": "answer"}
ENDPOINT = {"kind": "endpoint", "url": "http://h/v1", "model": "m", "criteria": "how kind it is"}
PLAN: dict[str, Any] = {
    "model": {"base": "hub/small-model-1b"},
    "data": {"prompts": {"path": "x.jsonl"}, "pairs1": {"stage": "pairs1"}},
    "stages": {
        "sft": {"kind": "sft", "data": "demos"},
        "reward": {"kind": "reward", "data": "pairs"},
        "ppo": {"kind": "ppo", "from": "sft", "data": "prompts", "reward": [{**NUMERIC, "weight": 2.0}, "reward"]},
        "pairs1": {"kind": "sample", "from": "sft", "data": "prompts", "reward": {**ENDPOINT, "on_failure": "skip"}},
        "dpo": {"kind": "dpo", "from": "sft", "data": "pairs1"},
        "dpo2": {"kind": "dpo", "from": "dpo", "data": "pairs"},
        "grpo": {"kind": "grpo", "from": "sft", "data": "prompts", "reward": [{"function": "m:f"}]},
    },
}


def said_of(judge: dict[str, Any], *policies: str) -> str | None:
    """What is said of the only judge where these policies are evaluated."""
    plan = {**PLAN, "eval": {"judges": [judge]}}
    return next(iter(self_judged(plan, policies or list(PLAN["stages"]), Path("runs/x")).values()), None)


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        (
            NUMERIC,
            "numeric is word for word a reward that ppo learnt from: a policy may have learnt to please it alone",
        ),
        ({**NUMERIC, "name": "sums"}, "sums is word for word a reward that ppo learnt from"),
        ({**NUMERIC, "column": "other"}, None),
        ({**NUMERIC, "tolerance": 0.1}, None),
        # rows that it sampled, and what goes on from there; whether it compares or rates
        (ENDPOINT, "m is word for word a reward that dpo, dpo2 learnt from"),
        ({**ENDPOINT, "mode": "score", "retries": 9, "timeout": 3}, "a reward that dpo, dpo2 learnt from"),
        ({**ENDPOINT, "criteria": "how brief it is"}, None),
        ({**ENDPOINT, "url": "http://other/v1"}, None),
        ({"kind": "function", "function": "m:f"}, "f is word for word a reward that grpo learnt from"),
        ({"kind": "function", "function": "m:g"}, None),
        ({"kind": "reward", "stage": "reward"}, "the policies of ppo were trained to please it"),
        ({"kind": "human"}, None),
    ],
)
def test_a_judge_that_a_policy_was_trained_to_please_is_named(judge, said):
    found = said_of(judge)
    assert (found is None) == (said is None), found
    assert said is None or (found is not None and said in found and found.endswith("."))


def test_only_where_such_a_policy_is_evaluated():
    assert said_of(NUMERIC, "sft", "dpo") is None
    assert "that dpo2 learnt from" in str(said_of(ENDPOINT, "sft", "dpo2"))
    assert said_of({"kind": "reward", "stage": "reward"}, "sft") == (
        "reward is one of this run's own models (reward): models prefer what sounds like themselves."
    )
    assert self_judged({}, ["sft"], Path("runs/x")) == {} == self_judged({"eval": {"judges": "x"}}, [], Path("x"))
