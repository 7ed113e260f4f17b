"""The whole evaluation on a random model: rows, files, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from preftune.data.load import load_rows
from preftune.data.spec import DataSpec, SourceSpec
from preftune.data.split import split_rows
from preftune.errors import UserError
from preftune.eval.commands import eval_kl, eval_perplexity, eval_reward, eval_winrate
from preftune.eval.report.page import write_report
from preftune.eval.run import run_eval
from preftune.eval.spec import EvalSpec, RewardModel
from preftune.models.adapters import AdapterSet
from preftune.models.loading import load_model, resolve_base
from preftune.models.lora import LoraSpec

from .chat_server import ChatServer, completion
from .conftest import shake

KEYS = {
    *("policy", "reference", "judge", "n", "mean_score", "win_rate", "ci_low", "ci_high", "ties", "length", "eos_rate"),
    *("length_controlled_win_rate", "rating_log_odds", "rating_low", "rating_high", "against"),
    *("kl", "kl_se", "kl_per_token", "temperature", "seed"),
    *("length_se", "eos_rate_se", "repetition", "repetition_se"),
}
RUBRIC = {"kind": "rubric", "checks": [{"kind": "max_words", "value": 2}, {"kind": "excludes_any", "values": ["e"]}]}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run folder with two adapters, one of them with a score head, and the data."""
    root = tmp_path_factory.mktemp("run")
    base = resolve_base("random:llama")
    adapters = AdapterSet.create(load_model(base), base, LoraSpec(r=2, alpha=4), parent=None)
    adapters.save("default", root / "sft")
    shake(adapters, "default", seed=1)
    adapters.save("default", root / "dpo")
    prompts = [{"prompt": f"question {place}", "topic": place} for place in range(6)]
    demos = [{"prompt": f"question {place}", "completion": "an answer" * (place + 1)} for place in range(12)]
    pairs = [{"prompt": f"question {place}", "chosen": "yes please", "rejected": "no"} for place in range(5)]
    for name, rows in (("prompts", prompts), ("demos", demos), ("pairs", pairs)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def source(name: str) -> DataSpec:
    return DataSpec((SourceSpec(f"{name}.jsonl"),))


def make_spec(run_dir: Path, **changes) -> EvalSpec:
    settings = {
        "base": resolve_base("random:llama"),
        "policies": {"base": None, "sft": run_dir / "sft", "dpo": run_dir / "dpo"},
        "reference": "sft",
        "prompts": source("prompts"),
        "folders": (run_dir,),
        "judges": (RUBRIC,),
        "max_new_tokens": 8,
    }
    return EvalSpec(**(settings | changes))


def test_results_have_a_row_for_every_policy_and_judge(run_dir):
    judges = (RUBRIC, RUBRIC | {"name": "again"})
    rows = run_eval(make_spec(run_dir, judges=judges), run_dir)
    assert rows == json.loads((run_dir / "eval" / "results.json").read_text())
    assert [(row["policy"], row["judge"]) for row in rows] == [
        (policy, judge) for policy in ("base", "sft", "dpo") for judge in ("rubric", "again")
    ]
    for row in rows:
        assert set(row) >= KEYS
        assert (row["reference"], row["n"], row["temperature"], row["seed"]) == ("sft", 6, 0.7, 0)
        assert 0 < row["length"] <= 8
    by_policy = {row["policy"]: row for row in rows}
    # An untrained adapter is its base: the same replies and no KL at all.
    for policy in ("base", "sft"):
        assert (by_policy[policy]["win_rate"], by_policy[policy]["ties"], by_policy[policy]["kl"]) == (0.5, 6, 0.0)
    assert by_policy["dpo"]["kl"] > 0
    assert by_policy["dpo"]["against"]["sft"]["win_rate"] == by_policy["dpo"]["win_rate"]
    # six ties are no certainty: the interval is Wilson's of 3 in 6
    assert by_policy["base"]["against"]["sft"] == {
        "win_rate": 0.5, "ci_low": pytest.approx(0.18762, abs=1e-5), "ci_high": pytest.approx(0.81238, abs=1e-5), "n": 6
    }  # fmt: skip
    assert sum(row["rating_log_odds"] for row in by_policy.values()) == pytest.approx(0.0, abs=1e-9)
    samples = [json.loads(line) for line in (run_dir / "eval" / "samples.jsonl").read_text().splitlines()]
    assert [(line["policy"], line["prompt_index"]) for line in samples] == [
        (policy, place) for policy in ("base", "sft", "dpo") for place in range(6)
    ]
    assert set(samples[0]["scores"]) == {"rubric", "again"}
    # base and sft say the same, and the reference is not held against itself
    assert [samples[place]["outcomes"] for place in (0, 6)] == [{"rubric": 0.5, "again": 0.5}, {}]
    dpo = [line["outcomes"]["rubric"] for line in samples[12:]]
    assert sum(dpo) / 6 == pytest.approx(by_policy["dpo"]["win_rate"])
    better = [
        line["scores"]["rubric"] > samples[6 + place]["scores"]["rubric"] for place, line in enumerate(samples[12:])
    ]
    assert [each == 1 for each in dpo] == better
    assert not (run_dir / "eval" / "rewards.json").exists()
    assert write_report(run_dir).is_file()


def test_a_second_run_replaces_the_first_and_leaves_nothing_beside(run_dir):
    spec = make_spec(run_dir, policies={"dpo": run_dir / "dpo"}, reference="base", judges=(), kl=False)
    first = run_eval(spec, run_dir)
    assert run_eval(spec, run_dir) == first
    assert [row["policy"] for row in first] == ["base", "dpo"]
    assert all(row["judge"] is None and row["kl"] is None and row["win_rate"] is None for row in first)
    assert all(row["against"] is None and row["length_controlled_win_rate"] is None for row in first)
    assert not [path for path in run_dir.iterdir() if path.name.startswith(".eval")]


def test_single_measurements(run_dir):
    spec = make_spec(run_dir)
    rates, kls = eval_winrate(spec), eval_kl(spec)
    assert "kl" not in rates[0]
    assert [row["policy"] for row in kls] == ["base", "sft", "dpo"]
    assert kls[2]["tokens"] == pytest.approx(6 * rates[2]["length"])
    assert kls[2]["kl_per_token"] * kls[2]["tokens"] == pytest.approx(6 * kls[2]["kl"])


def test_people_judge_where_they_voted(run_dir):
    vote = {"prompt": 2, "policy_a": "dpo", "policy_b": "sft", "preference": 1}
    (run_dir / "votes.jsonl").write_text(json.dumps(vote) + "\n")
    rows = eval_winrate(make_spec(run_dir, judges=(RUBRIC, {"kind": "human", "votes": "votes.jsonl"})), run_dir)
    people = {row["policy"]: row for row in rows if row["judge"] == "human"}
    assert (people["dpo"]["n"], people["dpo"]["win_rate"], people["dpo"]["unparsable"]) == (1, 1.0, 5)
    assert people["dpo"]["against"]["base"]["win_rate"] is None
    assert people["base"]["win_rate"] is people["base"]["mean_score"] is people["dpo"]["rating_log_odds"] is None


def test_a_prompt_without_a_verdict_has_no_outcome(run_dir):
    vote = {"prompt": 2, "policy_a": "sft", "policy_b": "dpo", "preference": 1}
    (run_dir / "votes.jsonl").write_text(json.dumps(vote) + "\n")
    run_eval(make_spec(run_dir, judges=({"kind": "human", "votes": "votes.jsonl"},), kl=False), run_dir)
    samples = [json.loads(line) for line in (run_dir / "eval" / "samples.jsonl").read_text().splitlines()]
    dpo = [line["outcomes"]["human"] for line in samples if line["policy"] == "dpo"]
    assert dpo == [None, None, 0.0, None, None, None]
    assert all(line["scores"] == {} for line in samples)


def test_judges_behind_an_endpoint_are_asked_once_and_say_what_they_cost(run_dir, monkeypatch, capsys):
    key = "sk-test-0123456789abcdef"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def rate_or_shrug(body, n):
        # a rating for who is asked for one; nothing that can be read for who is asked to compare
        return completion("[[4]]" if "You rate" in body["messages"][0]["content"] else "hard to say")

    with ChatServer(rate_or_shrug) as server:
        shared = {"kind": "endpoint", "url": server.url, "model": "tiny"}
        rater = {**shared, "mode": "score", "name": "rater", "price_per_million": {"input": 1.0, "output": 0}}
        spec = make_spec(run_dir, judges=(RUBRIC, rater, {**shared, "name": "pairs"}))
        rows = run_eval(spec, run_dir)
        sent = len(server.bodies)
        log = capsys.readouterr().err
        again = run_eval(spec, run_dir)
        # what could not be read is asked again, and nothing else
        assert len(server.bodies) == sent + 12
        write_report(run_dir)
    by_name = {(row["policy"], row["judge"]): row for row in rows}
    rated, compared = by_name["dpo", "rater"], by_name["dpo", "pairs"]
    assert (rated["mean_score"], rated["win_rate"], rated["ties"], rated["unparsable"]) == (4.0, 0.5, 6, 0)
    assert (compared["win_rate"], compared["mean_score"], compared["n"], compared["unparsable"]) == (None, None, 0, 6)
    # base and sft say the same, so there are two sets of replies: rated one by one, compared in both orders
    assert (rated["usage"]["requests"], compared["usage"]["requests"], sent) == (12, 12, 24)
    assert rated["usage"]["cost"] == pytest.approx(12 * 10 / 1e6)
    assert compared["usage"]["cost"] is None
    assert "usage" not in by_name["dpo", "rubric"]
    assert "eval rater: 12 requests (0 of them sent again), 0 answers from the cache, 120 tokens read" in log
    cached = {row["judge"]: row["usage"] for row in again if "usage" in row}
    assert cached["rater"] == {
        "requests": 0, "retries": 0, "cached": 12, "prompt_tokens": 0, "completion_tokens": 0, "cost": 0.0, "unread": {}
    }  # fmt: skip
    assert [{k: v for k, v in row.items() if k != "usage"} for row in again] == [
        {k: v for k, v in row.items() if k != "usage"} for row in rows
    ]
    assert set(server.keys) == {f"Bearer {key}"}
    written = [file for file in run_dir.rglob("*") if file.is_file()]
    assert run_dir / "report.html" in written
    assert not [file for file in written if key.encode() in file.read_bytes()]
    assert key not in log


def test_perplexity_rows(run_dir):
    rows = eval_perplexity(make_spec(run_dir), source("demos"))
    assert [row["policy"] for row in rows] == ["base", "sft", "dpo"]
    assert rows[0]["nll"] == pytest.approx(rows[1]["nll"], abs=1e-6)
    assert rows[0]["nll"] != pytest.approx(rows[2]["nll"], abs=1e-3)
    assert rows[0]["n"] == 12
    assert rows[0]["ci_low"] < rows[0]["perplexity"] < rows[0]["ci_high"]


def test_only_what_training_left_out_is_measured(run_dir):
    data = source("demos")
    _, held = split_rows(load_rows(data, "demo", (run_dir,)).rows, 0.5, data.seed)
    (row,) = eval_perplexity(make_spec(run_dir, policies={}, reference="base"), replace(data, held_out=0.5))
    assert 0 < row["n"] == len(held) < 12


def test_replies_are_drawn_to_what_training_left_out(run_dir):
    prompts = replace(source("demos"), held_out=0.5)
    _, held = split_rows(load_rows(prompts, "prompt", (run_dir,)).rows, 0.5, prompts.seed)
    rows = run_eval(make_spec(run_dir, policies={"base": None, "sft": run_dir / "sft"}, prompts=prompts), run_dir)
    assert {row["n"] for row in rows} == {len(held)}
    samples = [json.loads(line) for line in (run_dir / "eval" / "samples.jsonl").read_text().splitlines()]
    said = {sample["prompt"][-1]["content"] for sample in samples}
    assert said == {row.prompt[-1]["content"] for row in held}


def test_no_prompt_left_out_is_an_error(run_dir):
    with pytest.raises(UserError, match=r"eval\.prompts\.held_out: .* leaves none held out"):
        run_eval(make_spec(run_dir, prompts=replace(source("demos"), held_out=1e-9)), run_dir)


def test_reward_rows_and_the_reward_judge(run_dir, reward_adapter):
    model = RewardModel(stage="rm", kind="reward", folder=reward_adapter, data=source("pairs"))
    (row,) = eval_reward(make_spec(run_dir), [model])
    assert (row["stage"], row["kind"], row["n"], row["longer_wins"], row["held_out"]) == ("rm", "reward", 5, 1.0, False)
    assert 0 <= row["accuracy"] <= 1
    judge = {"kind": "reward", "adapter": str(reward_adapter), "name": "rm"}
    rows = eval_winrate(make_spec(run_dir, judges=(judge,)))
    assert [each["judge"] for each in rows] == ["rm"] * 3
    assert rows[2]["mean_score"] != rows[1]["mean_score"]


@pytest.fixture(scope="module")
def reward_adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reward") / "rm"
    base = resolve_base("random:llama")
    adapters = AdapterSet.create(load_model(base), base, LoraSpec(r=2, alpha=4), parent=None)
    adapters.add_head("default", bias=False)
    shake(adapters, "default", seed=3)
    adapters.save("default", folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reference": "ppo"}, "'ppo' is not among the policies"),
        ({"temperature": 0}, "no KL"),
        ({"temperature": -1.0}, "expected 0 or more"),
        ({"max_new_tokens": 0}, "expected 1 or more"),
    ],
)
def test_a_wrong_spec_is_refused(run_dir, changes, said):
    with pytest.raises(UserError, match=said):
        make_spec(run_dir, **changes)


def test_a_policy_without_an_adapter_is_refused(run_dir):
    with pytest.raises(UserError, match="holds no adapter"):
        run_eval(make_spec(run_dir, policies={"ppo": run_dir / "ppo"}, reference="base"), run_dir)


def test_greedy_works_without_kl(run_dir):
    rows = eval_winrate(make_spec(run_dir, temperature=0, kl=False))
    assert rows[0]["temperature"] == 0


def test_policies_whose_names_differ_in_a_dot_are_two(run_dir, tmp_path):
    policies = {"a.b": run_dir / "sft", "a_b": run_dir / "dpo", "a__b": run_dir / "dpo", "a_0b": run_dir / "sft"}
    rows = run_eval(make_spec(run_dir, policies=policies, reference="a.b", kl=True), tmp_path)
    by_policy = {row["policy"]: row for row in rows}
    assert by_policy.keys() == policies.keys()
    assert by_policy["a.b"]["kl"] == by_policy["a_0b"]["kl"] == 0
    assert by_policy["a_b"]["kl"] == by_policy["a__b"]["kl"] > 0
