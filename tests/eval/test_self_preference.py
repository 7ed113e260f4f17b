"""Judges that are no strangers to what they judge."""

import pytest

from preftune.eval.judges.self_preference import self_preference


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
    found = self_preference(judge, base="hub/small-model-1b", stages=stages, pleased={"reward": "ppo"}, run_dir=run)
    assert (found is None) == (said is None)
    assert said is None or (found is not None and said in found)
