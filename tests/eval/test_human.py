"""People's votes as a judge."""

import json
import math

import pytest

from preftune.data.errors import UserError
from preftune.eval.human import HumanJudge
from preftune.eval.judges import plan_judges
from preftune.eval.samples import Prompt, Sample
from preftune.eval.votes import read_votes


def replies(policy: str, n: int = 4) -> list[Sample]:
    prompt = Prompt([{"role": "user", "content": "hi"}], [1])
    return [Sample(policy, place, prompt, f"{policy} says {place}", [3, 2], True) for place in range(n)]


def vote(prompt=0, a="sft", b="dpo", preference=2.0, **others) -> dict:
    return {"prompt": prompt, "policy_a": a, "policy_b": b, "preference": preference, **others}


@pytest.fixture
def judge(tmp_path):
    def made(*votes: dict) -> HumanJudge:
        path = tmp_path / "votes.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in votes))
        return HumanJudge("human", read_votes(path))

    return made


def test_votes_are_read_from_either_side(judge):
    people = judge(
        vote(0, preference=2), vote(1, "dpo", "sft", 1.75), vote(3, preference=1.5), vote(2, "ppo", "sft", 1)
    )
    assert people.compare(replies("dpo"), replies("sft")) == pytest.approx([1.0, 0.25, math.nan, 0.5], nan_ok=True)
    assert people.compare(replies("sft"), replies("dpo")) == pytest.approx([0.0, 0.75, math.nan, 0.5], nan_ok=True)
    assert people.compare(replies("ppo"), replies("dpo")) == pytest.approx([math.nan] * 4, nan_ok=True)


def test_several_votes_on_a_pair_are_averaged(judge):
    people = judge(vote(preference=2), vote(preference=2), vote(preference=1), vote(0, "dpo", "sft", 1))
    assert people.compare(replies("dpo", 1), replies("sft", 1)) == [0.75]


def test_votes_on_other_replies_are_refused(judge):
    same = judge(vote(1, completion_a="sft says 1", completion_b="dpo says 1"))
    assert same.compare(replies("dpo"), replies("sft"))[1] == 1.0
    other = judge(vote(1, completion_b="dpo said something else"))
    with pytest.raises(UserError, match=r"votes\.jsonl:1: a vote on another reply of 'dpo'"):
        other.compare(replies("dpo"), replies("sft"))
    with pytest.raises(UserError, match="prompt is 4, and the evaluation has 4 prompts"):
        judge(vote(4)).compare(replies("dpo"), replies("sft"))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (vote(prompt="0"), "prompt is '0'"),
        (vote(prompt=-1), "prompt is -1"),
        (vote(prompt=True), "prompt is True"),
        (vote(a=None), "policy_a is None"),
        (vote(a="dpo"), "both 'dpo'"),
        (vote(preference=3), "preference is 3"),
        ({"prompt": 0, "policy_a": "x", "policy_b": "y"}, "no 'preference'"),
        (vote(completion_a=3), "completion_a is 3"),
    ],
)
def test_a_malformed_vote_is_named(judge, bad, said):
    with pytest.raises(UserError, match=rf"votes\.jsonl:2: .*{said}"):
        judge(vote(), bad)


def test_no_votes_are_refused(judge):
    with pytest.raises(UserError, match="holds no votes"):
        judge()


def test_a_recipe_names_the_file(tmp_path, judge):
    judge(vote())
    (plan,) = plan_judges([{"kind": "human", "votes": "votes.jsonl"}], tmp_path)
    assert plan.name == "human"
    assert plan.open(None, None).compare(replies("dpo", 1), replies("sft", 1)) == [1.0]  # type: ignore[arg-type, union-attr]
    for raw, said in (({}, "expected a file"), ({"votes": "none.jsonl"}, "no file 'none.jsonl'")):
        with pytest.raises(UserError, match=said):
            plan_judges([{"kind": "human", **raw}], tmp_path)
